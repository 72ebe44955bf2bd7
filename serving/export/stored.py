"""A finished fewbits checkpoint, open for reading: what is in it, tensor by tensor, and what each tensor is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from fewbits.quant.architecture import empty_model
from fewbits.quant.checkpoint import INDEX
from fewbits.quant.errors import CheckpointError
from fewbits.quant.inspection import Inspection, inspect
from fewbits.quant.shards import TensorEntry, read_header, read_json, read_tensor
from fewbits.quant.targets import Target
from fewbits.quant.types import Layout, QuantizedTensor
from fewbits.serving.modules import resolve
from fewbits.serving.transformers import METHOD, FewbitsConfig


@dataclass(frozen=True)
class Stored:
    """A checkpoint whose headers have been read and whose names have been matched with the model's.

    Attributes:
        config: config.json, without its ``quantization_config``.
        model: the model, its parameters on the meta device.
        matrices: name -> what it is and how it is stored, of each quantized matrix.
        entries: name -> where it lies, of everything stored.
        facts: totals, plan and lock (:func:`fewbits.quant.inspection.inspect`).
    """

    path: Path
    config: dict[str, Any]
    model: PreTrainedModel
    matrices: dict[str, tuple[Target, Layout]]
    entries: dict[str, TensorEntry] = field(repr=False)
    facts: Inspection = field(repr=False)

    def read(self, name: str) -> QuantizedTensor:
        """A quantized matrix. Raises FormatError when what is stored does not fit its layout."""
        prefix = name + "."
        tensors = {k: read_tensor(self.path, prefix + k, entry) for k, entry in self._local[name].items()}
        return QuantizedTensor.unpack(tensors, self.matrices[name][1])

    def dense(self, name: str) -> Tensor:
        """A tensor that is stored as it is."""
        return read_tensor(self.path, name, self.entries[name])

    @cached_property
    def dense_names(self) -> list[str]:
        """Everything that belongs to no quantized matrix, in the order of the shards."""
        packed = {f"{name}.{k}" for name, local in self._local.items() for k in local}
        return [n for n in self.entries if n not in packed]

    @cached_property
    def _local(self) -> dict[str, dict[str, TensorEntry]]:
        """Tensors of each quantized matrix, by their local names."""
        out: dict[str, dict[str, TensorEntry]] = {name: {} for name in self.matrices}
        for full, entry in self.entries.items():
            name, _, leaf = full.rpartition(".")
            if name in out and leaf.startswith("weight_"):
                out[name][leaf] = entry
        return out

    def by_shard(self) -> Iterator[list[str]]:
        """Names, of matrices and of dense tensors, shard by shard: so much is held in memory at a time."""
        places: dict[str, list[str]] = {}
        for name in self.matrices:
            places.setdefault(self.entries[f"{name}.weight_shape"].file, []).append(name)
        for name in self.dense_names:
            places.setdefault(self.entries[name].file, []).append(name)
        for file in sorted(places):
            yield places[file]

    @property
    def tied(self) -> dict[str, str]:
        """Parameters that are another one by a second name, and are not stored."""
        return {k: v for k, v in self.model.all_tied_weights_keys.items()
                if k not in self.entries and f"{k.rpartition('.')[0]}.weight_shape" not in self.entries}


def open_stored(directory: str | Path) -> Stored:
    """Open a checkpoint that ``fewbits quantize`` wrote.

    Raises:
        CheckpointError: it is none, or incomplete, or does not fit its config.json.
    """
    path = Path(directory)
    facts = inspect(path)
    config = read_json(path / "config.json")
    found = config.pop("quantization_config", None)
    if not isinstance(found, dict) or found.get("quant_method") != METHOD:
        raise CheckpointError(f"{path}: config.json names no fewbits quantization; name a directory that fewbits "
                              "quantize has written")
    quantization = FewbitsConfig.from_dict(found)
    assert isinstance(quantization, FewbitsConfig)
    try:
        model = empty_model(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError, RuntimeError) as error:
        raise CheckpointError(f"{path}: transformers cannot build this model: {error}") from error
    entries: dict[str, TensorEntry] = {}
    for file in dict.fromkeys(sorted(read_json(path / INDEX)["weight_map"].values())):
        entries |= read_header(path / file)
    resolved = resolve(model, quantization.default or "", exceptions=quantization.exceptions, keep=quantization.keep)
    matrices = {target.name: (target, layout) for target, layout in resolved
                if not _reads_another(target, model, entries)}
    for name in matrices:
        if f"{name}.weight_shape" not in entries:
            raise CheckpointError(f"{name}: not stored; the checkpoint is incomplete, quantize again")
    return Stored(path, config, model, matrices, entries, facts)


def _reads_another(target: Target, model: PreTrainedModel, entries: dict[str, TensorEntry]) -> bool:
    """Whether a tied matrix is stored under its other name only."""
    twin = model.all_tied_weights_keys.get(f"{target.name}.weight")
    return twin is not None and f"{target.name}.weight_shape" not in entries

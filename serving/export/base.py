"""What every export shares: the contract of a target, refusals, and writing a folder that is whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fewbits.quant.checkpoint import INDEX, disk_errors
from fewbits.quant.errors import CheckpointError, FormatError
from fewbits.quant.formats import layout_name
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.formats.levels import LevelsFormat
from fewbits.quant.source import MAX_EXTRA_BYTES
from fewbits.quant.targets import Target, find_targets
from fewbits.quant.types import Format, Layout, QuantizedTensor, Segment
from fewbits.serving.export.names import HubMatrix, hub_matrices, hub_names, hub_tensors
from fewbits.serving.export.stored import Stored

Progress = Callable[[str, int, int], None]

_OURS = ("config.json", "plan.json", "recipe.toml", "README.md")
_STEP = "Exporting"


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        target: the name of the target.
        bytes: of the weight files.
        tensors: quantized matrices that were written.
        warnings: what the user should know before serving it.
    """

    output: str
    target: str
    bytes: int
    tensors: int
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)


class Exporter(Protocol):
    """One target: what it takes, and how it is written. Options are fields of the implementing frozen dataclass."""

    @property
    def single_file(self) -> bool:
        """Whether it is one file and not a folder."""
        ...

    def obstacle(self, target: Target, layout: Layout) -> str | None:
        """Why a matrix cannot be written so, with the nearest choice that can; None where it can."""
        ...

    def write(self, stored: Stored, out: Path, progress: Progress) -> list[str]:
        """Write everything to ``out``, a folder that is there and empty or a file that is not; returns warnings.

        Raises FormatError where the values of a tensor do not fit.
        """
        ...


def require_exportable(stored: Stored, exporter: Exporter, name: str) -> None:
    """Raise FormatError that names the first matrix that the target cannot take, and how many there are."""
    found = [(n, why) for n, (t, layout) in stored.matrices.items() if (why := exporter.obstacle(t, layout))]
    if found:
        more = f" ({len(found)} of {len(stored.matrices)} tensors are like it)" if len(found) > 1 else ""
        raise FormatError(f"{found[0][0]}: {name} {found[0][1]}{more}")


FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What engines call the linears that they run as one -> the linears."""


def one_format(layout: Layout) -> Format | str:
    """The format of a whole matrix, or why it has none. A ternary one without a mean is one of integers to others."""
    if layout.permuted or len(layout.runs) > 1:
        return (f"takes one format for a tensor, its columns in their own order; got {layout_name(layout)[:60]}; "
                "quantize with allocate.unit = 'tensor'")
    if not layout.own_basis:
        return (f"takes codes of the weight in its own basis; got {layout_name(layout)}; serve it with fewbits or its "
                "vLLM plug-in, or quantize with --target")
    if layout.low_rank:
        return (f"takes codes alone; got {layout_name(layout)}, to which a product of rank {layout.low_rank} is added; "
                "serve it with fewbits or its vLLM plug-in, or set format.low_rank = 0")
    fmt = layout.runs[0][0]
    return fmt.integers or fmt if isinstance(fmt, LevelsFormat) else fmt


def one_integer_format(layout: Layout) -> IntFormat | str:
    """The integer format of a whole matrix, or why it has none."""
    fmt = one_format(layout)
    return fmt if isinstance(fmt, IntFormat | str) else f"takes integers alone; got {fmt.name}"


def linear_format(target: Target, layout: Layout) -> IntFormat | str:
    """The integer format of a linear or an expert, or why it cannot be written packed."""
    fmt = one_integer_format(layout)
    return fmt if isinstance(fmt, str) else kind_obstacle(target) or fmt


def kind_obstacle(target: Target) -> str | None:
    """Why a matrix cannot be written packed, whatever its format is."""
    if target.kind == "embedding":
        return "has no packed embeddings that every engine reads; quantize without --set embeddings=true"
    if target.kind == "conv1d":
        return "has no transposed linears (transformers' Conv1D); use the checkpoint with fewbits"
    return None


def integer_format(layout: Layout) -> IntFormat:
    """The integer format of a matrix that was found to have one."""
    fmt = one_integer_format(layout)
    assert isinstance(fmt, IntFormat)
    return fmt


def as_integers(tensor: QuantizedTensor) -> QuantizedTensor:
    """A matrix in a ternary format as the integers that it is (:func:`one_format`); any other as it is.

    Groups whose scale is 0 become zeros, whatever their codes are.
    """
    segment = tensor.segments[0]
    fmt = segment.format.integers if isinstance(segment.format, LevelsFormat) else None
    if fmt is None:
        return tensor
    scale = segment.params["scale"]
    codes = (segment.codes + 1).view(*scale.shape, -1).masked_fill((scale == 0).unsqueeze(-1), 2)
    return QuantizedTensor(tensor.shape, (Segment(fmt, codes.view_as(segment.codes), {"scale": scale}),))


def group_of(fmt: IntFormat, columns: int) -> int | None:
    """The group size, or None where a group is the whole row."""
    return None if fmt.group_size in (None, columns) else fmt.group_size


# -- folders as transformers has them --------------------------------------------------------------------------------


Convert = Callable[[str, QuantizedTensor], Mapping[str, Tensor]]
"""``convert(hub name, matrix)``: the tensors that stand for it, by their local names, e.g. ``weight_packed``."""


def packed(stored: Stored, convert: Convert) -> Callable[[list[str]], dict[str, Tensor]]:
    """What :func:`write_folder` asks for: matrices as ``convert`` has them, everything else as it is."""
    by_owner: dict[str, list[HubMatrix]] = {}
    for matrix in hub_matrices(stored):
        by_owner.setdefault(matrix.of, []).append(matrix)

    def tensors_of(names: list[str]) -> dict[str, Tensor]:
        tensors = hub_tensors(stored, {n: stored.dense(n) for n in names if n not in stored.matrices})
        for name in names:
            if name in stored.matrices:
                whole = as_integers(stored.read(name))
                for hub in by_owner[name]:
                    part = whole if hub.rows is None else whole.rows(hub.rows)
                    tensors |= {f"{hub.name}.{k}": t.contiguous() for k, t in convert(hub.name, part).items()}
        return tensors

    return tensors_of


def write_folder(
    stored: Stored, folder: Path, quantization_config: Mapping[str, Any] | None,
    tensors_of: Callable[[list[str]], dict[str, Tensor]], progress: Progress,
) -> None:
    """Shards, index and config.json as ``save_pretrained`` names them, and the tokenizer's files.

    Args:
        tensors_of: of the names of a shard, what is written for them, by the names of the hub.
    """
    shards = list(stored.by_shard())
    index: dict[str, str] = {}
    size = 0
    for i, names in enumerate(shards):
        progress(_STEP, i, len(shards))
        tensors = tensors_of(names)
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(dict(sorted(tensors.items())), folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        size += sum(t.nbytes for t in tensors.values())
    progress(_STEP, len(shards), len(shards))
    quantization = {} if quantization_config is None else {"quantization_config": dict(quantization_config)}
    _write_json(folder / "config.json", _config(stored) | quantization)
    _write_json(folder / "model.safetensors.index.json",
                {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))})
    for path in carried(stored.path):
        shutil.copyfile(path, folder / path.name)


def _config(stored: Stored) -> dict[str, Any]:
    """config.json, which no longer says that the head is the embedding where the head has codes of its own."""
    config = dict(stored.config)
    if stored.model.all_tied_weights_keys and not stored.tied:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
    return config


def dense_linears(stored: Stored) -> list[str]:
    """What multiplies by a matrix that stays as it is: linears, heads, routers. Configurations list them.

    By the names of the hub and by those in the model: engines look for either.
    """
    packed = {t.module_path for t, _ in stored.matrices.values()}
    names = [path for path, module in stored.model.named_modules()
             if path not in packed and not isinstance(module, nn.Embedding)
             and isinstance(weight := getattr(module, "weight", None), Tensor) and weight.ndim == 2]
    return sorted({*names, *hub_names(stored, names)})


def dense_experts(stored: Stored) -> list[str]:
    """Projections of experts that stay as they are, by the names of the hub."""
    kept: dict[str, Tensor] = {}
    for target in find_targets(stored.model):
        if target.kind == "expert" and target.name not in stored.matrices:
            param = getattr(stored.model.get_submodule(target.module_path), target.param_name)
            kept[f"{target.module_path}.{target.param_name}"] = torch.zeros(*param.shape[:2], 1)
    return [name.removesuffix(".weight") for name in hub_tensors(stored, kept)]


def carried(folder: Path) -> list[Path]:
    """Files that any copy of the model should have: tokenizer, templates, generation config, licence, lock."""
    return [p for p in sorted(folder.iterdir())
            if p.is_file() and not p.is_symlink() and not p.name.startswith(".") and p.name not in _OURS
            and p.suffix not in (".safetensors", ".py") and not p.name.endswith(".index.json")
            and p.stat().st_size <= MAX_EXTRA_BYTES]


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


@contextlib.contextmanager
def staged(out: Path, *, single_file: bool, force: bool) -> Iterator[Path]:
    """A place beside ``out`` to write to, moved there when all went well, and removed when not.

    Raises:
        CheckpointError: ``out`` is taken, or the disk is full or read-only.
    """
    taken = out.exists() and not (out.is_dir() and not single_file and not any(out.iterdir()))
    if taken and not force:
        raise CheckpointError(f"{out}: exists; choose another output, or --force to replace it")
    if taken and (out.is_dir() == single_file or not _is_export(out)):
        raise CheckpointError(f"{out}: is no export that could be replaced; choose another output")
    with disk_errors(out):
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise CheckpointError(f"{out}: cannot be written ({error}); choose another output") from error
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
        try:
            place = work / out.name
            if not single_file:
                place.mkdir()
            yield place
            _publish(place, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def _is_export(out: Path) -> bool:
    """Whether an export of ours lies there, and not a model, a checkpoint or other people's files."""
    if out.is_dir():
        return (out / "fewbits.lock").is_file() and not (out / INDEX).is_file()
    with open(out, "rb") as f:
        return f.read(4) == b"GGUF"


def _publish(place: Path, out: Path) -> None:
    umask = os.umask(0)
    os.umask(umask)
    for path in [place, *place.rglob("*")]:  # safetensors makes files that only their owner can read
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
    if out.is_dir():
        old = place.parent / "replaced"
        os.replace(out, old)
    os.replace(place, out)


def totals(out: Path) -> int:
    """Bytes of the weight files of an export."""
    files: Sequence[Path] = [out] if out.is_file() else list(out.glob("*.safetensors"))
    return sum(p.stat().st_size for p in files)

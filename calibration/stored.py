"""Calibration statistics on disk, so that several recipes can use them without running the model again.

They are those of the original model (``calibration.inputs = "original"``): what a quantized prefix produces depends
on the recipe and cannot be shared.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fewbits.quant.checkpoint import disk_errors, read_shard, write_atomically
from fewbits.quant.errors import CheckpointError
from fewbits.quant.shards import read_json
from fewbits.quant.types import LayerStats


class StoredStats:
    """A directory of statistics: one safetensors file a block, and ``stats.json``, written last, saying of what.

    Args:
        folder: the directory.
        identity: model, text and settings that the statistics depend on.

    Raises:
        CheckpointError: the directory holds statistics of something else.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = json.loads(json.dumps(identity))
        if folder.exists() and not folder.is_dir():
            raise CheckpointError(f"--stats {folder}: is a file, needed a directory; choose another")
        self.complete = (folder / "stats.json").exists()
        self._groups: dict[str, list[list[str]]] = {}
        if self.complete:
            known = read_json(folder / "stats.json")
            recorded, groups = known.get("identity"), known.get("groups")
            if not isinstance(recorded, dict) or not isinstance(groups, dict):
                raise CheckpointError(f"{folder}: stats.json is not what fewbits writes; choose another directory")
            for key, value in self._identity.items():
                if recorded.get(key) != value:
                    raise CheckpointError(f"{folder}: holds statistics of another run ({key} differs); "
                                          "repeat its model and calibration options, or choose another directory")
            self._groups = groups

    def groups(self, index: int, wanted: Collection[str]) -> list[list[str]]:
        """Targets of block ``index`` grouped by the input that they share.

        Raises CheckpointError when one of ``wanted`` is not among them.
        """
        groups = self._groups.get(str(index), [])
        if missing := sorted(set(wanted) - {n for g in groups for n in g}):
            raise self._lacking(missing[0])
        return groups

    def read(self, index: int) -> dict[str, LayerStats]:
        """Statistics of each group of block ``index``, under the name of its first target."""
        return self._read(f"block-{index:05d}.safetensors")

    def read_head(self) -> LayerStats:
        """Statistics of the output head. Raises CheckpointError when they were not gathered."""
        if not (self.folder / "head.safetensors").exists():
            raise self._lacking("the output head")
        return self._read("head.safetensors")["head"]

    def _lacking(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: has no statistics of {name}; gather them anew in another directory")

    def write(self, index: int, groups: list[list[str]], stats: Mapping[str, LayerStats]) -> None:
        self._groups[str(index)] = groups
        self._write(f"block-{index:05d}.safetensors", stats)

    def write_head(self, stats: LayerStats) -> None:
        self._write("head.safetensors", {"head": stats})

    def finish(self) -> None:
        """Declare the directory complete."""
        if not self.complete:
            text = json.dumps({"identity": self._identity, "groups": self._groups}, indent=1, sort_keys=True)
            with disk_errors(self.folder):
                write_atomically(self.folder / "stats.json", text + "\n")
            self.complete = True

    def _read(self, name: str) -> dict[str, LayerStats]:
        tensors = read_shard(self.folder / name)
        names = [k.removesuffix(".xtx") for k in tensors if k.endswith(".xtx")]
        return {n: LayerStats(tensors[f"{n}.xtx"], int(tensors[f"{n}.n_tokens"])) for n in names}

    def _write(self, name: str, stats: Mapping[str, LayerStats]) -> None:
        tensors: dict[str, Tensor] = {}
        for key, value in stats.items():
            tensors[f"{key}.xtx"] = value.xtx.cpu().contiguous()
            tensors[f"{key}.n_tokens"] = torch.tensor(value.n_tokens)
        with disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            temp = self.folder / f"{name}.tmp"
            save_file(tensors, temp, metadata={"format": "pt"})
            temp.replace(self.folder / name)

"""The hidden states between two blocks, of all calibration text."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HIDDEN_LIMIT_BYTES = 2 << 30
"""Hidden states beyond this go to disk. Changes no number."""


class HiddenStates:
    """The hidden states of every batch between two blocks, in memory up to a limit and on disk beyond it."""

    def __init__(self, batches: list[Tensor], limit_bytes: int, folder: Path | None) -> None:
        self.shapes = [tuple(b.shape) for b in batches]
        self.dtype = batches[0].dtype
        self.device = batches[0].device
        sizes = [b.numel() * b.element_size() for b in batches]
        self._offsets = [sum(sizes[:i]) for i in range(len(sizes))]
        self._file = None
        if sum(sizes) > limit_bytes:
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the object
        self._memory: list[Tensor] = [] if self._file else list(batches)
        if self._file:
            for i, batch in enumerate(batches):
                self[i] = batch

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def spilled(self) -> bool:
        return self._file is not None

    def __getitem__(self, i: int) -> Tensor:
        if self._file is None:
            return self._memory[i]
        self._file.seek(self._offsets[i])
        size = torch.Size(self.shapes[i]).numel() * self.dtype.itemsize
        raw = torch.from_numpy(np.frombuffer(bytearray(self._file.read(size)), dtype=np.uint8))
        return raw.view(self.dtype).view(self.shapes[i]).to(self.device)

    def __setitem__(self, i: int, value: Tensor) -> None:
        if self._file is None:
            self._memory[i] = value
            return
        self._file.seek(self._offsets[i])
        self._file.write(value.detach().to(self.dtype).cpu().contiguous().view(torch.uint8).numpy().tobytes())

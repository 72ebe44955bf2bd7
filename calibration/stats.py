"""Sums of ``x x^T`` over calibration tokens, and the tap that sees the input of every linear.

Linears that read the same tensor (q, k and v; gate and up) share one sum, found by the identity of the tensor and not
by their names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewbits.quant.types import LayerStats

_BLOCKS = 4


class Gram:
    """Running sum of ``x^T x`` for inputs ``x (T, K)``: float32, upper block triangle only until read."""

    def __init__(self, columns: int, device: torch.device, *, cross: bool = False) -> None:
        self.xtx = torch.zeros(columns, columns, device=device)
        self.cross = torch.zeros(columns, columns, device=device) if cross else None
        self.n_tokens = 0
        step = max(64, -(-columns // _BLOCKS // 64) * 64)
        self._edges = [*range(0, columns, step), columns]

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add tokens ``x (T, K)``; ``original`` is the same tokens' input in the original model (for ``cross``)."""
        x32 = x.float()
        edges = self._edges
        for i in range(len(edges) - 1):  # x^T x is symmetric: 10 of 16 blocks are enough
            rows = slice(edges[i], edges[i + 1])
            self.xtx[rows, edges[i] :].addmm_(x32[:, rows].T, x32[:, edges[i] :])
        if self.cross is not None:
            assert original is not None
            self.cross.addmm_((original.float() - x32).T, x32)
        self.n_tokens += x.shape[0]

    def stats(self) -> LayerStats:
        """The sums so far, mirrored to a full symmetric matrix."""
        full = self.xtx.triu()
        return LayerStats(full + full.triu(1).T, self.n_tokens, self.cross)


OnInput = Callable[[str, Tensor, Tensor], None]


class InputTap(TorchFunctionMode):
    """While active, calls ``on_input(name, x, tokens)`` whenever a watched weight multiplies an input ``x (..., K)``.

    Weights are told apart by where their data lies, so it does not matter who calls: nn.Linear, GPT-2's Conv1D
    (addmm), or fused experts that index a 3-D parameter. ``tokens`` are the positions, in the flattened batch, of the
    rows of ``x``: experts see only the tokens that were routed to them, gathered by an integer index.
    """

    def __init__(self, watched: Mapping[int, str], on_input: OnInput, n_tokens: int) -> None:
        super().__init__()
        self._watched = watched
        self._on_input = on_input
        self._all = torch.arange(n_tokens)
        self._routed: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self._see(args[0], args[1])
        elif func is torch.addmm:
            self._see(args[1], args[2])
        elif func is Tensor.__getitem__ and _is_gather(args[1]) and args[0].shape[0] == len(self._all):
            self._routed = args[1]
        return func(*args, **(kwargs or {}))

    def _see(self, x: Tensor, weight: Tensor) -> None:
        if (name := self._watched.get(weight.data_ptr())) is None:
            return
        rows = x.numel() // x.shape[-1]
        if rows == len(self._all):
            self._on_input(name, x, self._all)
        else:
            assert self._routed is not None and len(self._routed) == rows, f"{name}: cannot tell which tokens it sees"
            self._on_input(name, x, self._routed)


def _is_gather(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim == 1

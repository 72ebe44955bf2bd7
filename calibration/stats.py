"""Sums of ``x x^T`` over calibration tokens, and the tap that sees the input of every linear.

Linears that read the same tensor (q, k and v; gate and up) share one sum, found by the identity of the tensor and not
by their names.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewbits.quant.types import LayerStats

_BLOCKS = 4
_MASSIVE = 8.0  # a token whose input is this many times longer than the median


class Gram:
    """Running sum of ``x^T x`` for inputs ``x (T, K)``: float32, upper block triangle only until read.

    Inputs in bfloat16 are multiplied in bfloat16, which processors do at least twice as fast. A product is then rounded
    to bfloat16, relative to its size, which could make the sum indefinite: so what is large and known (the mean, and
    the few tokens of massive activations) is taken out first and summed in float32.
    """

    def __init__(self, columns: int, device: torch.device, *, cross: bool = False) -> None:
        self.xtx = torch.zeros(columns, columns, device=device)
        self.cross = torch.zeros(columns, columns, device=device) if cross else None
        self.n_tokens = 0
        step = max(64, -(-columns // _BLOCKS // 64) * 64)
        self._edges = [*range(0, columns, step), columns]

    def add(self, x: Tensor, original: Tensor | None = None) -> None:
        """Add tokens ``x (T, K)``; ``original`` is the same tokens' input in the original model (for ``cross``)."""
        if x.dtype != torch.bfloat16 or not len(x):  # products of float16 would overflow in float16
            return self._add(x.float(), original)
        norms = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        massive = norms > _MASSIVE * norms.median()
        self._add(x[massive].float(), None if original is None else original[massive])
        self._add_centered(x[~massive], None if original is None else original[~massive])

    def _add_centered(self, x: Tensor, original: Tensor | None) -> None:
        """``sum x x^T`` with ``x = c + m``: ``sum c c^T`` in the dtype of x, what has the mean m in float32."""
        about = x.mean(0)
        centered, mean = x - about, about.float()
        self._add(centered, None if original is None else (original.float() - mean))
        rest = centered.sum(0, dtype=torch.float32)
        self.xtx.addr_(rest, mean).addr_(mean, rest).addr_(mean, mean, alpha=len(x))
        if self.cross is not None and original is not None:
            shift = (original.float() - mean - centered.float()).to(x.dtype)
            self.cross.addr_(shift.sum(0, dtype=torch.float32), mean)

    def _add(self, x: Tensor, original: Tensor | None) -> None:
        diagonal = self.xtx.diagonal() + torch.linalg.vector_norm(x, dim=0, dtype=torch.float32).square()
        for start, end in itertools.pairwise(self._edges):  # x^T x is symmetric: 10 of 16 blocks are enough
            _add_product(self.xtx[start:end, start:], x[:, start:end], x[:, start:])
        self.xtx.diagonal().copy_(diagonal)  # the largest of all, and so the most rounded
        if self.cross is not None:
            assert original is not None
            _add_product(self.cross, (original.float() - x.float()).to(x.dtype), x)
        self.n_tokens += x.shape[0]

    def stats(self) -> LayerStats:
        """The sums so far, mirrored to a full symmetric matrix: in place, no copy is made."""
        for start, end in itertools.pairwise(self._edges):
            self.xtx[start:end, :start] = self.xtx[:start, start:end].T
            corner = self.xtx[start:end, start:end].triu()  # a product need not be symmetric to the last bit
            self.xtx[start:end, start:end] = corner + corner.triu(1).T
        return LayerStats(self.xtx, self.n_tokens, self.cross)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a^T b``, in place."""
    if a.dtype == torch.float32:
        total.addmm_(a.T, b)
    else:
        total.add_(a.T @ b)


OnInput = Callable[[str, Tensor, Tensor], None]


class InputTap(TorchFunctionMode):
    """While active, calls ``on_input(name, x, tokens)`` whenever a watched weight multiplies an input ``x (..., K)``.

    Weights are told apart by where their data lies, so it does not matter who calls: nn.Linear, GPT-2's Conv1D
    (addmm), or fused experts that index a 3-D parameter. ``tokens`` are the positions, in the flattened batch, of the
    rows of ``x``: those named in ``routed`` (experts) see only the tokens that were routed to them, gathered by an
    integer index. Where those are all tokens, the index still says in which order.
    """

    def __init__(
        self, watched: Mapping[int, str], on_input: OnInput, n_tokens: int, *, routed: Collection[str] = ()
    ) -> None:
        super().__init__()
        self._watched = watched
        self._on_input = on_input
        self._all = torch.arange(n_tokens)
        self._experts = routed
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
        routed = name in self._experts and self._routed is not None
        tokens = self._routed if routed else self._all
        rows = x.numel() // x.shape[-1]
        assert tokens is not None and len(tokens) == rows, f"{name}: cannot tell which tokens it sees"
        self._on_input(name, x, tokens)


def _is_gather(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype == torch.int64 and index.ndim == 1

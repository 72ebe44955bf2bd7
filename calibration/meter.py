"""KL to the original of a whole model with some weights replaced, measured again and again on the same text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fewbits.calibration.stream import find_blocks
from fewbits.quant.targets import find_targets, read_weight

_TOKENS = 128
"""Taken at a time: their logits stay in the processor's cache."""


class KLMeter:
    """Measures KL(original || changed) in nats per token, the mean over every position of fixed rows.

    Blocks in front of the first change are not run again: what leaves them is kept.

    Args:
        model: the original model, dense; it is changed for the time of a measurement and put back.
        rows: token ids ``(T,)`` of each sequence. Kept for each token: its probabilities (float32) and its hidden
            state in front of every block.
    """

    def __init__(self, model: Any, rows: Sequence[Tensor]) -> None:
        self._model, self._rows = model, rows
        self._targets = {t.name: t for t in find_targets(model)}
        self._path = find_blocks(model)
        self._blocks = model.get_submodule(self._path)
        self._hidden: list[list[Tensor]] = []
        self._original: list[tuple[Tensor, float]] = []
        for row in rows:
            kept: list[Tensor] = []
            hooks = [b.register_forward_pre_hook(lambda m, args, k=kept: k.append(args[0])) for b in self._blocks]
            log_p = self._logits(row).float().log_softmax(-1)
            entropy = -sum(_sum_of_products(part.exp(), part) for part in log_p.split(_TOKENS))
            self._original.append((log_p.exp_(), entropy))
            for hook in hooks:
                hook.remove()
            self._hidden.append(kept)

    def measure(self, weights: Mapping[str, Tensor]) -> float:
        """KL with these weights ``(N, K)`` in place of the original's, by name."""
        return float(self.by_row(weights).mean())

    def by_row(self, weights: Mapping[str, Tensor], rows: Sequence[int] | None = None) -> Tensor:
        """The same for each row (of ``rows``, or all): ``(R,)`` float64."""
        before = {n: read_weight(self._model, self._targets[n]).clone() for n in weights}
        try:
            self._put(weights)
            picked = range(len(self._rows)) if rows is None else rows
            return torch.tensor([self._kl(i, self._first_block(weights)) for i in picked], dtype=torch.float64)
        finally:
            self._put(before)

    def rebase(self, weights: Mapping[str, Tensor]) -> None:
        """Replace weights for good: later measurements change this model, and are still against the original."""
        self._put(weights)
        self._hidden = [[] for _ in self._rows]

    def _put(self, weights: Mapping[str, Tensor]) -> None:
        for name, weight in weights.items():
            read_weight(self._model, self._targets[name]).copy_(weight)

    def _first_block(self, weights: Mapping[str, Tensor]) -> int:
        prefix = self._path + "."
        if not all(name.startswith(prefix) for name in weights):
            return 0
        return min((int(n[len(prefix) :].partition(".")[0]) for n in weights), default=0)

    def _logits(self, row: Tensor) -> Tensor:
        with torch.no_grad():
            return self._model(row[None].to(self._model.device), use_cache=False).logits[0]

    def _kl(self, i: int, first: int) -> float:
        with self._starting_at(first if self._hidden[i] else 0, i):
            logits = self._logits(self._rows[i])
        probabilities, entropy = self._original[i]
        parts = zip(logits.split(_TOKENS), probabilities.split(_TOKENS))
        crossed = -sum(_sum_of_products(p, z.float().log_softmax(-1)) for z, p in parts)
        return (crossed - entropy) / len(self._rows[i])

    @contextmanager
    def _starting_at(self, first: int, i: int) -> Iterator[None]:
        """Inside, the model runs from block ``first`` on, whose input is the one kept of row ``i``."""
        skipped = list(self._blocks)[:first]
        for block in skipped:
            block.forward = lambda states, *args, **kwargs: self._hidden[i][first]
        try:
            yield
        finally:
            for block in skipped:
                del block.forward


def _sum_of_products(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(-1).sum(dtype=torch.float64))

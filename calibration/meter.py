"""KL to the original of a whole model with some weights replaced, measured again and again on the same text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.quant.targets import find_targets, read_weight


class KLMeter:
    """Measures KL(original || changed) in nats per token, the mean over every position of fixed rows.

    Args:
        model: the original model, dense; it is changed for the time of a measurement and put back.
        rows: token ids ``(T,)`` of each sequence. Logits of the original are kept in float16 (tokens x vocabulary x 2
            bytes), which moves a KL by less than 1e-4.
    """

    def __init__(self, model: Any, rows: Sequence[Tensor]) -> None:
        self._model, self._rows = model, rows
        self._targets = {t.name: t for t in find_targets(model)}
        self._original = [self._logits(row).half() for row in rows]

    def measure(self, weights: Mapping[str, Tensor]) -> float:
        """KL with these weights ``(N, K)`` in place of the original's, by name."""
        return float(self.by_row(weights).mean())

    def by_row(self, weights: Mapping[str, Tensor], rows: Sequence[int] | None = None) -> Tensor:
        """The same for each row (of ``rows``, or all): ``(R,)`` float64."""
        before = {n: read_weight(self._model, self._targets[n]).clone() for n in weights}
        try:
            self.put(weights)
            picked = range(len(self._rows)) if rows is None else rows
            return torch.tensor([self._kl(i) for i in picked], dtype=torch.float64)
        finally:
            self.put(before)

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Replace weights and leave them so."""
        for name, weight in weights.items():
            read_weight(self._model, self._targets[name]).copy_(weight)

    def _logits(self, row: Tensor) -> Tensor:
        with torch.no_grad():
            return self._model(row[None].to(self._model.device), use_cache=False).logits[0]

    def _kl(self, i: int) -> float:
        total = 0.0
        for changed, original in zip(self._logits(self._rows[i]).split(256), self._original[i].split(256)):
            p, q = original.float().log_softmax(-1), changed.float().log_softmax(-1)
            total += float((p.exp() * (p - q)).sum(dtype=torch.float64))
        return total / len(self._rows[i])

"""Round to nearest: each weight by itself. Needs no calibration; the baseline that everything else must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbits.quant.quantizers.fit import fit_layout, in_coded_basis
from fewbits.quant.types import LayerStats, Layout, QuantizedTensor, Segment

Clip = Literal["minmax", "search"]


@dataclass(frozen=True)
class RTN:
    """Round to nearest.

    Attributes:
        clip: ``minmax`` covers each group's range; ``search`` shrinks it where that lowers the squared error.
    """

    clip: Clip = "minmax"

    needs_stats = False
    stacks = True

    def quantize(
        self, weight: Tensor, stats: LayerStats | None, layout: Layout, *, seed: int = 0
    ) -> tuple[QuantizedTensor, dict[str, float]]:
        """Quantize ``weight (N, K)``, of any float dtype; given statistics, the clip search weighs columns by them."""
        return in_coded_basis(self._round, weight, stats, layout, seed)

    def _round(
        self, weight: Tensor, stats: LayerStats | None, layout: Layout
    ) -> tuple[QuantizedTensor, dict[str, float]]:
        rows, columns = weight.shape
        weight = weight.float()
        importance = None
        if self.clip == "search":
            importance = torch.ones(columns) if stats is None else stats.hessian.diagonal()
        segments = []
        for (fmt, n), params, start in fit_layout(weight, importance, layout):
            segments.append(Segment.nearest(fmt, weight[:, start : start + n], params))
        return QuantizedTensor((rows, columns), tuple(segments)), {}

"""Round to nearest: each weight by itself. Needs no calibration; the baseline that everything else must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbits.quant.quantizers.fit import fit_layout, with_sorted_columns
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

    def quantize(
        self, weight: Tensor, stats: LayerStats | None, layout: Layout, *, seed: int = 0
    ) -> tuple[QuantizedTensor, dict[str, float]]:
        """Quantize ``weight (N, K)``, of any float dtype; given statistics, the clip search weighs columns by them."""
        if layout.permuted:
            return with_sorted_columns(self, weight, stats, layout, seed)
        rows, columns = weight.shape
        weight = weight.float()
        importance = None
        if self.clip == "search":
            importance = torch.ones(columns) if stats is None else stats.hessian.diagonal()
        segments = []
        for (fmt, n), params, start in fit_layout(weight, importance, layout):
            run = weight[:, start : start + n].view(rows, fmt.groups(n), -1)
            codes = fmt.encode(run, {k: v.unsqueeze(-1) for k, v in params.items()}).view(rows, n)
            segments.append(Segment(fmt, codes, params))
        return QuantizedTensor((rows, columns), tuple(segments)), {}

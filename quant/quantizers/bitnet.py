"""The ternary rule of BitNet b1.58: one scale for a whole tensor, taken from its magnitudes alone.

``gamma = mean |W|`` (arXiv 2402.17764) or ``median |W|`` (BitNet b1.58 Reloaded, arXiv 2407.09527), and
``W ~ gamma clip(round(W / gamma), -1, 1)``. Networks are trained to live with it; as a way to quantize one that
was not, it is the baseline of ternary formats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fewbits.quant.errors import FormatError
from fewbits.quant.formats.levels import LevelsFormat
from fewbits.quant.formats.scalar import storable
from fewbits.quant.quantizers.fit import in_coded_basis
from fewbits.quant.types import LayerStats, Layout, QuantizedTensor, Segment

Measure = Literal["absmean", "absmedian"]


@dataclass(frozen=True)
class BitNet:
    """BitNet's ternary weights.

    Attributes:
        scale: what the scale is of the magnitudes. The median of an even number of them is the lower of the middle two.
    """

    scale: Measure = "absmean"

    needs_stats = False
    stacks = False

    def quantize(
        self, weight: Tensor, stats: LayerStats | None, layout: Layout, *, seed: int = 0
    ) -> tuple[QuantizedTensor, dict[str, float]]:
        """Quantize ``weight (N, K)``, of any float dtype.

        Raises:
            FormatError: the layout is not ternary without a mean throughout.
        """
        for fmt, _ in layout.runs:
            if not isinstance(fmt, LevelsFormat) or fmt.family != "ternary" or fmt.mean:
                raise FormatError(f"bitnet: got {fmt.name}, it knows ternary weights alone; set format.layout = "
                                  "'ternary_row', or quantizer.name = 'gptq'")
        return in_coded_basis(self._round, weight, stats, layout, seed)

    def _round(
        self, weight: Tensor, stats: LayerStats | None, layout: Layout
    ) -> tuple[QuantizedTensor, dict[str, float]]:
        weight = weight.float()
        gamma = storable(tensor_scale(weight, self.scale), torch.float16)
        segments, start = [], 0
        for fmt, columns in layout.runs:
            params = {"scale": gamma.expand(len(weight), fmt.groups(columns))}
            segments.append(Segment.nearest(fmt, weight[:, start : start + columns], params))
            start += columns
        return QuantizedTensor((weight.shape[0], weight.shape[1]), tuple(segments)), {"gamma": float(gamma)}


def tensor_scale(weight: Tensor, measure: Measure) -> Tensor:
    """The mean or the median of the magnitudes, a float32 scalar."""
    size = weight.float().abs()
    return size.mean() if measure == "absmean" else size.median()

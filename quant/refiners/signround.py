"""Learned rounding: AutoRound's SignRound (arXiv 2309.05516), over any scalar format, and the parameters with it.

The codes are the nearest of ``W + V step`` with ``|V| <= 1/2``, so that every weight is rounded up or down, and never
further. V starts at 0, which is plain rounding on the grid that the quantizer left (GPTQ's codes are kept where they
are better), and moves by steps of nearly one size, as a sign does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fewbits.quant.refiners.block import BlockRefiner
from fewbits.quant.refiners.tunable import Tunable
from fewbits.quant.types import QuantizedTensor, Segment


@dataclass(frozen=True)
class SignRound(BlockRefiner):
    """The table ``[refine.signround]``: that of :class:`BlockRefiner`."""

    code_rate: Annotated[float, Field(gt=0, le=1)] = 0.02

    def tunable(self, tensor: QuantizedTensor, weight: Tensor, seed: int) -> Tunable:
        return _Rounded(tensor, weight)


class _Rounded(Tunable):
    def __init__(self, tensor: QuantizedTensor, weight: Tensor) -> None:
        self._centers: dict[int, Tensor] = {}
        super().__init__(tensor, weight)
        self._recode(1.0)

    def _start(self, i: int, target: Tensor) -> Tensor:
        self._centers[i] = target
        return target.clone()

    def _codes(self, i: int, now: Segment, most: float) -> Tensor:
        center, half = self._centers[i], self._units[i] / 2
        self.latents[i] = center + (self.latents[i] - center).clamp(-half, half)
        return Segment.nearest(now.format, self.latents[i], now.params).codes

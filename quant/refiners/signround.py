"""Learned rounding: AutoRound's SignRound (arXiv 2309.05516), over any scalar format, and the parameters with it.

The codes are the nearest of ``W + V step``. V starts where that is the quantizer's code (in the paper at 0, plain
rounding: what feedback had gained would have to be found again) and stays within 1/2, or between there and its start: a
weight is rounded up or down, or as the quantizer had it. V moves by steps of nearly one size, as a sign does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
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
        self._bounds: dict[int, tuple[Tensor, Tensor]] = {}
        super().__init__(tensor, weight)

    def _start(self, i: int, target: Tensor) -> Tensor:
        value, half = super()._start(i, target), self._units[i] / 2
        self._bounds[i] = torch.minimum(target - half, value), torch.maximum(target + half, value)
        return value

    def _codes(self, i: int, now: Segment, most: float) -> Tensor:
        self.latents[i] = self.latents[i].clamp(*self._bounds[i])
        return Segment.nearest(now.format, self.latents[i], now.params).codes

"""Codes chosen among their neighbours by a relaxed draw that is annealed (GSQ, IST Austria, 2026), on the same grid.

Every code has a logit for itself and for each neighbour, one up and one down (of 2 bits and less: for all codes). In
training a weight is the mean of their values under a softmax of ``(logit + Gumbel noise) / tau``; tau falls, so that
the mean becomes a choice, and in the end the most likely code is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.formats.levels import LevelsFormat
from fewbits.quant.refiners.block import BlockRefiner
from fewbits.quant.refiners.tunable import Moments, Tunable
from fewbits.quant.types import Params, QuantizedTensor, Segment

_TAU = (2.0, 0.05)
_BIAS = 3.0
"""What the logit of the code that there was has more than its neighbours', at a distance of one."""


@dataclass(frozen=True)
class Gumbel(BlockRefiner):
    """The table ``[refine.gumbel]``: that of :class:`BlockRefiner`."""

    code_rate: Annotated[float, Field(gt=0, le=1)] = 0.1

    def tunable(self, tensor: QuantizedTensor, weight: Tensor, seed: int) -> Tunable:
        return _Relaxed(tensor, seed)


def _levels(segment: Segment) -> int | None:
    """How many codes, in the order of their values; None where they have no such order."""
    fmt = segment.format
    if isinstance(fmt, IntFormat):
        return fmt.levels
    if isinstance(fmt, LevelsFormat) and (fmt.family in ("ternary", "seq", "binary")):
        return fmt.basis.levels
    return None


class _Relaxed(Tunable):
    """Attributes:
    offsets: of the codes that a weight may take, from the one it had.
    """

    def __init__(self, tensor: QuantizedTensor, seed: int) -> None:
        super().__init__(tensor)
        self._draw = torch.Generator().manual_seed(seed)
        self._tau = _TAU[0]
        self._first = tensor
        self._offsets: dict[int, list[int]] = {}
        self._noise: dict[int, Tensor] = {}
        for i, segment in enumerate(tensor.segments):
            if (levels := _levels(segment)) is None:
                continue
            reach = levels - 1 if levels <= 4 else 1
            offsets = self._offsets[i] = list(range(-reach, reach + 1))
            codes = segment.codes.long()
            bias = [torch.full(codes.shape, -_BIAS * o * o, device=codes.device) for o in offsets]
            logits = torch.stack([b.masked_fill((codes + o < 0) | (codes + o >= levels), -torch.inf)
                                  for o, b in zip(offsets, bias)])
            self.latents[i] = logits
            self._units[i] = torch.ones(())
            self._moments[i] = Moments.like(logits)

    def anneal(self, progress: float) -> None:
        self._tau = _TAU[0] + (_TAU[1] - _TAU[0]) * progress
        for i, logits in self.latents.items():
            uniform = torch.rand(logits.shape, generator=self._draw).clamp_(1e-9, 1 - 1e-7)
            self._noise[i] = -torch.log(-torch.log(uniform)).to(logits.device)

    def _part(self, i: int, params: Params, latent: Tensor | None) -> Tensor:
        if latent is None or i not in self._noise:
            return super()._part(i, params, None)
        share = ((latent + self._noise[i]) / self._tau).softmax(0)
        first = self._first.segments[i]
        out = torch.zeros_like(latent[0])
        for k, offset in enumerate(self._offsets[i]):
            codes = (first.codes.int() + offset).clamp(0, (_levels(first) or 1) - 1).to(torch.uint8)
            out = out + share[k] * Segment(first.format, codes, params).dequantize()
        return out

    def _codes(self, i: int, now: Segment, most: float) -> Tensor:
        logits = self.latents[i]
        offsets = torch.tensor(self._offsets[i], dtype=torch.int32, device=logits.device)[logits.argmax(0)]
        return (self._first.segments[i].codes.int() + offsets).to(torch.uint8)

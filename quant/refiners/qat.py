"""Quantization-aware training from a pretrained model: weights themselves are trained, with their codes in the loop.

Latent weights start at the original ones. The model computes with ``(1 - mix) W + mix Q(W)``, where Q rounds to the
nearest codes and gradients go straight through; ``mix`` rises from 0 to 1, so that the network is turned into a
quantized one by degrees (as BitNet b1.58's finetunes do). Scales and norms are learned beside them, the loss is the
divergence from the original. This is training, and wants far more text than the other refiners.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fewbits.quant.refiners.distill import Distill
from fewbits.quant.refiners.tunable import Tunable
from fewbits.quant.refiners.whole import Schedule
from fewbits.quant.types import Params, QuantizedTensor, Segment


@dataclass(frozen=True)
class QAT(Distill):
    """The table ``[refine.qat]``: all of :class:`Distill`, and

    Attributes:
        steps: of training; 0: as many as ``epochs`` make.
        warm_up: share of the steps in which ``mix`` rises.
        code_rate: learning rate of latent weights, in steps of their grids.
    """

    samples: Annotated[int, Field(ge=1)] = 4096
    checks: Annotated[int, Field(ge=1)] = 32
    steps: Annotated[int, Field(ge=0)] = 0
    warm_up: Annotated[float, Field(ge=0, le=1)] = 0.3
    code_rate: Annotated[float, Field(gt=0, le=1)] = 0.004
    rate: Annotated[float, Field(ge=0, le=1)] = 0.003

    def tunable(self, tensor: QuantizedTensor, weight: Tensor) -> Tunable:
        return _Trained(tensor, weight, self.warm_up)

    def schedule(self) -> Schedule:
        return replace(super().schedule(), code_rate=self.code_rate, fixed_steps=self.steps)


class _Trained(Tunable):
    def __init__(self, tensor: QuantizedTensor, weight: Tensor, warm_up: float) -> None:
        self._warm_up, self._mix = warm_up, 0.0
        super().__init__(tensor, weight)
        self._recode(1.0)

    def anneal(self, progress: float) -> None:
        self._mix = min(1.0, progress / self._warm_up) if self._warm_up else 1.0

    def _start(self, i: int, target: Tensor) -> Tensor:
        return target.clone()

    def _part(self, i: int, params: Params, latent: Tensor | None) -> Tensor:
        if latent is None:
            return super()._part(i, params, None)
        return torch.lerp(latent, super()._part(i, params, latent), self._mix)

    def _codes(self, i: int, now: Segment, most: float) -> Tensor:
        """The nearest of latents, which no code holds back: they are weights."""
        return Segment.nearest(now.format, self.latents[i], now.params).codes

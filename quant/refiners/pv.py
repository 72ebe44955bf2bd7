"""PV-Tuning (arXiv 2405.14852): codes move too, a few at a time, by the gradient of the end-to-end loss.

The P step is that of :mod:`fewbits.quant.refiners.distill`. The V step keeps latent weights, which the gradient of the
dense weight moves as if they were the weight (its straight-through buffer); the codes nearest to them are proposals,
and of those the share that would move the weight most is taken. A step that changes few codes may move them far, where
one that changed all of them would have to be too small to change any (section 3.2). All formats whose nearest codes are
quick to find can be tuned: integers, levels, grids and codebooks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from fewbits.quant.refiners.distill import Distill
from fewbits.quant.refiners.tunable import Tunable
from fewbits.quant.refiners.whole import Schedule
from fewbits.quant.types import QuantizedTensor


@dataclass(frozen=True)
class PV(Distill):
    """The table ``[refine.pv]``: all of :class:`Distill`, and

    Attributes:
        code_rate: learning rate of latents, in steps of their grids.
        most: share of the codes that a step may change.
    """

    code_rate: Annotated[float, Field(gt=0, le=1)] = 0.02
    most: Annotated[float, Field(gt=0, le=1)] = 0.001

    def tunable(self, tensor: QuantizedTensor, weight: Tensor) -> Tunable:
        return Tunable(tensor, weight)

    def schedule(self) -> Schedule:
        return replace(super().schedule(), code_rate=self.code_rate, most=self.most)

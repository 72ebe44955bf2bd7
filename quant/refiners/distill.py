"""End-to-end tuning of what is continuous: scales, codebooks, rotations' scales, norms and biases; codes stay.

The original is the teacher, and the loss is how far the student's next-token distributions are from its own (see
:class:`~fewbits.quant.refiners.losses.Loss`). It is the second phase of EfficientQAT (arXiv 2407.11062) with a teacher
in place of labels, and the P step of PV-Tuning (arXiv 2405.14852).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from fewbits.quant.refiners.effort import Effort
from fewbits.quant.refiners.losses import Kind, Loss
from fewbits.quant.refiners.tunable import Tunable
from fewbits.quant.refiners.whole import Schedule
from fewbits.quant.types import QuantizedTensor


@dataclass(frozen=True)
class Distill:
    """What the recipe's table ``[refine.distill]`` may say.

    Attributes:
        samples: calibration rows to tune on; those that statistics are taken of come first.
        held_out: rows beyond them that decide when to stop, and whether it helped.
        epochs: passes over the rows.
        batch: rows of a step.
        rate: learning rate, in the size of what moves; falls with the root of the loss where that is below a nat.
        weights: whether parameters of quantized weights move, or norms and biases alone.
        loss: kl, dad (tokens weighed by the teacher's entropy, to the power of gamma), or topk.
        gamma: of dad.
        top_k: tokens of topk.
        checks: looks at the held-out rows.
    """

    samples: Annotated[int, Field(ge=1)] = 256
    held_out: Annotated[int, Field(ge=1)] = 8
    epochs: Annotated[float, Field(gt=0)] = 1.0
    batch: Annotated[int, Field(ge=1)] = 4
    rate: Annotated[float, Field(ge=0, le=1)] = 0.006
    weights: bool = True
    loss: Kind = "kl"
    gamma: Annotated[float, Field(ge=0)] = 0.5
    top_k: Annotated[int, Field(ge=1)] = 64
    checks: Annotated[int, Field(ge=1)] = 8

    stage: ClassVar[str] = "model"

    def tunable(self, tensor: QuantizedTensor, weight: Tensor) -> Tunable:
        """The tensor, as this refiner moves it; ``weight (N, K)`` is the original."""
        return Tunable(tensor)

    def schedule(self) -> Schedule:
        return Schedule(self.epochs, self.batch, self.rate, 0.0, 1.0, self.checks,
                        Loss(self.loss, self.gamma, self.top_k))

    def share_out(self, rows: int) -> tuple[int, int]:
        """Of so many rows: how many to tune on, and the first of those to judge by, which are the last."""
        held_from = max(1, rows - self.held_out)
        return min(self.samples, held_from), held_from

    def with_effort(self, effort: Effort) -> Any:
        """The same with less text, or more passes over it."""
        if effort == "fast":
            return replace(self, samples=max(1, self.samples // 2), epochs=min(self.epochs, 1.0), checks=2)
        return self if effort == "normal" else replace(self, epochs=3 * self.epochs)

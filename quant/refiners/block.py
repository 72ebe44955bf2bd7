"""Tuning one decoder block towards what the original block gives: memory is that of one block.

Inputs are those that the quantized blocks before it produce, targets the outputs of the original on inputs of its own
(as in BRECQ, arXiv 2102.05426, and AQLM, arXiv 2401.06118), so that a block also makes up for errors of those before
it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fewbits.quant.refiners.effort import Effort
from fewbits.quant.refiners.leaves import Leaves
from fewbits.quant.refiners.tunable import Tunable
from fewbits.quant.types import QuantizedTensor

if TYPE_CHECKING:
    from fewbits.calibration.block import Block
    from fewbits.calibration.collect import Lesson

_LAST_RATE = 0.1


@dataclass(frozen=True)
class BlockRefiner:
    """What all refiners of blocks have in common.

    Attributes:
        iterations: steps for each block.
        batch: rows of a step.
        held_out: one of so many rows decides whether it helped.
        rate: of scales and codebooks, in their own size.
        code_rate: of what codes follow from.
        checks: looks at the held-out rows; what was best on them is kept.
    """

    iterations: Annotated[int, Field(ge=1)] = 50
    batch: Annotated[int, Field(ge=1)] = 8
    held_out: Annotated[int, Field(ge=2)] = 8
    rate: Annotated[float, Field(ge=0, le=1)] = 0.003
    code_rate: Annotated[float, Field(ge=0, le=1)] = 0.0
    checks: Annotated[int, Field(ge=1)] = 4

    stage: ClassVar[str] = "block"

    def tunable(self, tensor: QuantizedTensor, weight: Tensor, seed: int) -> Tunable:
        """The tensor, as this refiner moves it."""
        return Tunable(tensor)

    def with_effort(self, effort: Effort) -> Any:
        """The same with fewer steps, or more."""
        if effort == "normal":
            return self
        return dataclasses.replace(self, iterations=max(1, self.iterations // 3) if effort == "fast"
                                   else 4 * self.iterations)


def refine_block(
    refiner: BlockRefiner, block: Block, lesson: Lesson, tensors: Mapping[str, QuantizedTensor], *, seed: int
) -> tuple[dict[str, QuantizedTensor], float, float]:
    """The tensors of a block, tuned, and their loss on held-out rows before and after, relative to the targets' power.

    Where nothing lowers that loss they come back as they were. The block is left with weights that nobody should use.
    """
    tunables = {n: refiner.tunable(t, lesson.weights[n], seed + i) for i, (n, t) in enumerate(tensors.items())}
    leaves = Leaves(block.model, {t.name: t for t in block.targets}, tunables)
    rows = [(b, r) for b in range(len(lesson.inputs)) for r in range(lesson.inputs.shapes[b][0])]
    held = rows[:: refiner.held_out]
    own = [row for row in rows if row not in set(held)] or rows
    draw = torch.Generator().manual_seed(seed + block.index)
    leaves.install(tensors)
    before = best = _loss(block, lesson, held)
    kept = dict(tensors)
    checks = {math.ceil(refiner.iterations * (i + 1) / refiner.checks) for i in range(refiner.checks)}
    leaves.watch(True)
    leaves.anneal(0.0)
    for step in range(refiner.iterations):
        chosen = [own[i] for i in torch.randint(0, len(own), (refiner.batch,), generator=draw).tolist()]
        with torch.enable_grad():
            for error, power in _errors(block, lesson, chosen):
                (error / (power * len(chosen))).backward()
        factor = _LAST_RATE + (1 - _LAST_RATE) * (1 - step / refiner.iterations)
        leaves.step(rate=refiner.rate * factor, code_rate=refiner.code_rate * factor)
        if step + 1 in checks:
            frozen, _ = leaves.stored()
            leaves.install(frozen)
            if (seen := _loss(block, lesson, held)) < best:
                best, kept = seen, frozen
        leaves.anneal((step + 1) / refiner.iterations)
    leaves.watch(False)
    return kept, before, best


@torch.no_grad()
def _loss(block: Block, lesson: Lesson, rows: list[tuple[int, int]]) -> float:
    pairs = [(float(error), power) for error, power in _errors(block, lesson, rows)]
    return sum(e for e, _ in pairs) / max(sum(p for _, p in pairs), 1e-30)


def _errors(block: Block, lesson: Lesson, rows: list[tuple[int, int]]) -> Iterator[tuple[Tensor, float]]:
    """For each row: the squared error of the block's output, and the power of what it should be."""
    for batch, row in sorted(rows):
        call, size = lesson.calls[batch], lesson.inputs.shapes[batch][0]
        hidden, target = lesson.inputs[batch][row : row + 1], lesson.targets[batch][row : row + 1].float()
        out = block.module(hidden, *_of_row(call.args, row, size), **_of_row(call.kwargs, row, size))
        out = out[0] if isinstance(out, tuple) else out
        # what the block adds is what it is judged by; the stream that it adds it to is far larger
        power = float((target - hidden.float()).square().sum())
        yield (out.float() - target).square().sum(), max(power, 1e-30)


def _of_row(value: Any, row: int, size: int) -> Any:
    """One row of the tensors that a call has for each row of its batch of ``size`` (masks, positions)."""
    if isinstance(value, Tensor):
        return value[row : row + 1] if value.ndim >= 2 and value.shape[0] == size else value
    if isinstance(value, tuple):
        return tuple(_of_row(v, row, size) for v in value)
    if isinstance(value, dict):
        return {k: _of_row(v, row, size) for k, v in value.items()}
    return value

"""How long refiners will take on this machine: from a trial of one block, the head, and a step of a tensor."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.calibration.stream import StreamedModel
from fewbits.eval.speed import now
from fewbits.quant.plan import Assignment
from fewbits.quant.quantizers.rtn import RTN
from fewbits.quant.refiners import Refiner
from fewbits.quant.refiners.block import BlockRefiner
from fewbits.quant.refiners.losses import Loss, pull
from fewbits.quant.refiners.tunable import Tunable
from fewbits.quant.refiners.whole import MICRO_TOKENS


@dataclass(frozen=True)
class Pace:
    """Seconds that this machine takes.

    Attributes:
        forward, backward: one block, one token: there, and there and back.
        judge, pull: head and loss, one token: there, and there and back.
        step: moving what is stored, all blocks.
        blocks: how many there are.
    """

    forward: float
    backward: float
    judge: float
    pull: float
    step: float
    blocks: int

    def of(self, refiner: Refiner, rows: int, length: int) -> float:
        """Seconds of a refiner over ``rows`` of ``length`` tokens, those that it holds out included."""
        if isinstance(refiner, BlockRefiner):
            there = (refiner.checks + 1) * (rows // refiner.held_out) * length * self.forward
            back = refiner.iterations * refiner.batch * length * self.backward
            return self.blocks * (there + back) + refiner.iterations * self.step
        schedule, (own, held_from) = refiner.schedule(), refiner.share_out(rows)
        steps, held = schedule.steps(own), rows - held_from
        there = (schedule.checks + 1) * held * length * (self.blocks * self.forward + self.judge)
        back = steps * schedule.batch * length * (self.blocks * self.backward + self.pull)
        return there + back + (steps * self.step if refiner.weights else 0.0)

    def of_all(self, refiners: Mapping[str, Refiner], calibrating: Tensor, tuning: Tensor | None) -> float:
        """Seconds of all refiners, and of the original that those of the whole model are measured by.

        Args:
            calibrating: token ids ``(rows, length)`` that refiners of blocks have.
            tuning: those that refiners of the whole model have.
        """
        in_blocks = [r for r in refiners.values() if isinstance(r, BlockRefiner)]
        total = sum(self.of(r, *calibrating.shape) for r in in_blocks)
        if tuning is not None:
            total += tuning.numel() * self.blocks * self.forward
            total += sum(self.of(r, *tuning.shape) for r in refiners.values() if r not in in_blocks)
        return total


def pace(streamed: StreamedModel, assignment: Assignment, length: int) -> Pace:
    """Try it: the first block and the head on a pass of tokens, in rows of ``length``."""
    rows = max(1, MICRO_TOKENS // length)
    tokens = rows * length
    vocabulary = streamed.model.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(tokens) * 7919 % vocabulary).view(rows, length)
    with streamed.outer(head=True):
        (hidden,), (calls,) = streamed.first_inputs([ids])
        states = hidden.flatten(0, 1)
        logits = partial(F.linear, weight=streamed.model.get_output_embeddings().weight.to(streamed.dtype))
        leaf = states.detach().requires_grad_()
        with torch.enable_grad():
            pulled = _seconds(lambda: pull(Loss(), logits, leaf * 1.0, states, 1.0), streamed.device)
        with torch.no_grad():
            judged = _seconds(lambda: pull(Loss(), logits, states, states, 1.0), streamed.device)
    with contextlib.closing(streamed.blocks()) as blocks:
        block = next(blocks)
        ran = _seconds(lambda: block.run(hidden, calls[block.index]), streamed.device)
        parameters = [*block.module.parameters()]

        def there_and_back() -> None:
            for p in parameters:
                p.requires_grad_()
                p.grad = None
            out = block.module(hidden, *calls[block.index].args, **calls[block.index].kwargs)
            (out[0] if isinstance(out, tuple) else out).sum().backward()

        with torch.enable_grad():
            trained = _seconds(there_and_back, streamed.device)
        for p in parameters:
            p.grad = None
            p.requires_grad_(False)
        quantized = [t for t in block.targets if t.name in assignment.layouts]
        stepped = 0.0
        if quantized:
            least = min(quantized, key=lambda t: t.shape[0] * t.shape[1])
            stepped = _step_seconds(block.weights[least.name].float(), assignment, least.name)
            stepped *= sum(t.shape[0] * t.shape[1] for t in quantized) / (least.shape[0] * least.shape[1])
    blocks_n = len(streamed.block_modules)
    return Pace(ran / tokens, trained / tokens, judged / tokens, pulled / tokens, stepped * blocks_n, blocks_n)


def _step_seconds(weight: Tensor, assignment: Assignment, name: str) -> float:
    layout = replace(assignment.layouts[name], permuted=False)  # there are no statistics to sort columns by
    tensor, _ = RTN().quantize(weight, None, layout, seed=0)
    tunable = Tunable(tensor)

    def step() -> None:
        tunable.step(weight, rate=1e-3)
        tunable.dense()

    return _seconds(step, weight.device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Of the faster of two runs: the first has more to set up."""
    times = [now(device)]
    for _ in range(2):
        work()
        times.append(now(device))
    return min(b - a for a, b in itertools.pairwise(times))

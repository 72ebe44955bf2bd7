"""Refining a checkpoint that is quantized: read it, tune it as a whole, write the shards anew.

What is under way is kept in the folder of the run, so that it can be resumed; a shard that is written anew replaces the
one before it when it is whole.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fewbits.calibration.block import Block
from fewbits.calibration.collect import Collector
from fewbits.calibration.stream import StreamedModel
from fewbits.calibration.survey import dense_model
from fewbits.quant.checkpoint import CheckpointWriter, RunFolder
from fewbits.quant.errors import CalibrationError, RecipeError
from fewbits.quant.plan import Assignment
from fewbits.quant.refiners.block import BlockRefiner, refine_block
from fewbits.quant.refiners.distill import Distill
from fewbits.quant.refiners.team import Team
from fewbits.quant.refiners.whole import Progress, Whole, finished, teacher_states, tune
from fewbits.quant.targets import read_weight
from fewbits.quant.types import QuantizedTensor


@dataclass
class Refined:
    """What a refiner did.

    Attributes:
        before, after: its loss on held-out rows: nats per token, or of a refiner of blocks the squared error of their
            outputs over the power of what they add, a mean over blocks.
        curve: ``(step, loss of the batch, loss on held-out rows or None)``; of a refiner of blocks ``(block, before,
            after)``.
    """

    name: str
    before: float
    after: float
    seconds: float
    curve: list[tuple[int, float, float | None]]

    @property
    def helped(self) -> bool:
        return self.after < self.before

    def to_json(self) -> dict[str, Any]:
        return {"refiner": self.name, "before": self.before, "after": self.after, "helped": self.helped,
                "seconds": self.seconds, "curve": self.curve}

    @property
    def warning(self) -> str | None:
        """What to tell where it did not help."""
        if self.helped:
            return None
        return f"{self.name}: the loss on held-out text ({self.before:.4f}) did not fall; all was left as it was"


def refine_in_block(
    refiners: Mapping[str, BlockRefiner], block: Block, collector: Collector, tensors: dict[str, QuantizedTensor],
    facts: list[dict[str, Any]], *, seed: int, spent: dict[str, float],
) -> dict[str, QuantizedTensor]:
    """Run the refiners of a block, one after the other, and install what they made.

    Says in ``facts`` what they did, and adds the seconds that they took to those in ``spent``.
    """
    lesson = collector.lesson(block)
    for name, refiner in refiners.items():
        started = time.monotonic()
        tensors, before, after = refine_block(refiner, block, lesson, tensors, seed=seed)
        spent[name] = spent.get(name, 0.0) + time.monotonic() - started
        facts[0].setdefault("block_refined", []).append({"refiner": name, "before": before, "after": after})
        if after < before:
            for fact in facts:
                fact.setdefault("refined", []).append(name)
    collector.install(block, tensors)
    return tensors


def of_blocks(
    refiners: Mapping[str, BlockRefiner], writer: CheckpointWriter, spent: Mapping[str, float]
) -> list[Refined]:
    """What refiners of blocks did, as the facts of the shards say: means over blocks, a point of the curve for each."""
    records = [r for i in range(writer.total) for fact in writer.facts(i) for r in fact.get("block_refined", [])]
    out = []
    for name in refiners:
        own = [r for r in records if r["refiner"] == name]
        curve: list[tuple[int, float, float | None]] = [(i, r["before"], r["after"]) for i, r in enumerate(own)]
        n = max(len(own), 1)
        out.append(Refined(name, sum(r["before"] for r in own) / n, sum(r["after"] for r in own) / n,
                           spent.get(name, 0.0), curve))
    return out


def require_shares(refiners: Mapping[str, Distill], rows: int, team: Team) -> None:
    """Before any work: there is text to tune on and to judge by, and every process has a part of it.

    Raises:
        RecipeError: a batch that the processes cannot share.
        CalibrationError: too little text.
    """
    for name, refiner in refiners.items():
        if refiner.batch % team.size:
            raise RecipeError(f"refine.{name}.batch: got {refiner.batch}, needed a multiple of the {team.size} "
                              "processes that share it; set it, or start another number of them")
        n, held_from = refiner.share_out(rows)
        if n < team.size or rows <= held_from:
            raise CalibrationError(f"refine.{name}: got a text of {rows} rows, needed {team.size} to tune on, one "
                                   "to judge by; give more text, or a smaller calibration.seqlen")


def refine_model(
    streamed: StreamedModel, assignment: Assignment, folder: RunFolder, refiners: Mapping[str, Distill],
    rows: Sequence[Tensor], *, seed: int, progress: Progress, team: Team,
) -> list[Refined]:
    """Run the refiners of a whole model over the checkpoint in ``folder``, one after the other.

    Args:
        folder: a :class:`CheckpointWriter` in the first process of the team.
        rows: token ids ``(L,)``, enough for the refiner that wants most: rows to tune on first, then held-out ones.

    """
    team.wait()  # for the first to have quantized
    stored = Stored(streamed, assignment, folder)
    mine = team.part(range(len(rows)))
    teacher: Teacher | None = None
    out = []
    for name, refiner in refiners.items():
        started = time.monotonic()
        keeper, schedule = folder.keeper(name), refiner.schedule()
        n, held_from = refiner.share_out(len(rows))
        own, held = [j for j, i in enumerate(mine) if i < n], [j for j, i in enumerate(mine) if i >= held_from]
        if (done := finished(keeper, stored.tensors)) is None:
            teacher = teacher or Teacher(streamed, [rows[i] for i in mine], progress)
            whole = Whole(teacher.student(stored, moves=refiner.weights), streamed.targets,
                          stored.tensors if refiner.weights else {}, make=refiner.tunable, norms=stored.norms,
                          team=team)
            done = tune(whole, teacher.rows, teacher.states, own, held, schedule, schedule.steps(n), seed=seed,
                        keeper=keeper, progress=progress, title=f"Refining: {name}")
        tuned, (tensors, norms) = done
        stored.tensors |= tensors
        stored.norms |= norms
        curve = [(i, loss, None if seen != seen else seen) for i, loss, seen in tuned.curve]
        out.append(Refined(name, tuned.before, tuned.after, time.monotonic() - started, curve))
    team.wait()  # for all to have read what there is
    if isinstance(folder, CheckpointWriter) and any(r.helped for r in out):
        stored.write(folder, [r.name for r in out if r.helped])
    return out


class Stored:
    """What a finished run of the quantizer left in its shards.

    Attributes:
        tensors: of the decoder blocks, by target.
        norms: dense parameters of one dimension, of the decoder: norms and biases.
    """

    def __init__(self, streamed: StreamedModel, assignment: Assignment, folder: RunFolder) -> None:
        self._assignment = assignment
        self.tensors: dict[str, QuantizedTensor] = {}
        self.outside: dict[str, QuantizedTensor] = {}
        self.norms: dict[str, Tensor] = {}
        decoder = {id(p) for p in streamed.model.get_decoder().parameters()}
        tunable = {n for n, p in streamed.model.named_parameters() if p.ndim == 1 and id(p) in decoder}
        names: dict[int | None, list[str]] = {}
        for name in assignment.layouts:
            names.setdefault(streamed.block_index(name), []).append(name)
        self._names = [names.get(index, []) for index in (None, *range(folder.total - 1))]
        for i, own in enumerate(self._names):
            shard = {k: v.to(streamed.device) for k, v in folder.read(i).items()}
            (self.tensors if i else self.outside).update(assignment.unpack(own, shard))
            self.norms |= {n: t for n, t in shard.items() if n in tunable}

    def write(self, writer: CheckpointWriter, refiners: list[str]) -> None:
        """Write what is in ``tensors`` and ``norms`` now."""
        for i, names in enumerate(self._names):
            shard, own = writer.read(i), names if i else []
            new = shard | self._assignment.pack({n: self.tensors[n] for n in own})
            new |= {n: t for n, t in self.norms.items() if n in shard}
            facts = writer.facts(i)
            for fact in facts:
                if fact["name"] in own or fact["name"] in self.norms:
                    fact["refined"] = refiners
            writer.write(i, new, facts)


class Teacher:
    """The original model, and what its decoder makes of the rows."""

    def __init__(self, streamed: StreamedModel, rows: Sequence[Tensor], progress: Progress) -> None:
        self._streamed = streamed
        self.rows = [row[None] for row in rows]
        self._model = dense_model(streamed, streamed.dtype)
        self.states = teacher_states(self._model, self.rows, progress)

    @torch.no_grad()
    def student(self, stored: Stored, *, moves: bool) -> Any:
        """The model with the original's weights, but for what is quantized and this refiner does not move.

        The teacher's own: its states are known, so that only one model is in memory.
        """
        model = dense_model(self._streamed, self._streamed.dtype) if self._model is None else self._model
        self._model = None
        fixed = stored.outside if moves else stored.outside | stored.tensors
        for name, tensor in fixed.items():
            read_weight(model, self._streamed.targets[name]).copy_(tensor.dequantize())
        return model

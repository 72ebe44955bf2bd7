"""What measured KL says about a damage model and its solution: a gate of trust, and a search from the solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewbits.calibration.meter import KLMeter
from fewbits.calibration.sensitivity import measured_alone
from fewbits.calibration.survey import Losses, Survey
from fewbits.quant.allocate.evopress import Choice, Evolved, Schedule, evolve
from fewbits.quant.allocate.knapsack import undominated
from fewbits.quant.allocate.menu import Unit
from fewbits.quant.errors import RecipeError
from fewbits.quant.types import QuantizedTensor

TRUSTED = 0.6
"""Least Spearman correlation with measured KL at which a damage model may decide."""

_LOGIT_BYTES = 3 << 30
_HELD_OUT = 6


@dataclass(frozen=True)
class Trust:
    """How well a damage model ranks tensors: Spearman's rho with KL measured one tensor at a time."""

    damage: str
    rho: float
    tensors: int
    measured: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"damage": self.damage, "spearman": self.rho, "tensors": self.tensors}


def sample_tensors(losses: Losses, n: int) -> dict[str, str]:
    """``n`` tensors spread over depth and type, each with the entry that hurts it most, where damage is clearest."""
    names = list(losses)
    step = max(1, len(names) // n)
    while step > 1 and len(names) > 7 and step % 7 == 0:  # a stride of whole blocks would see one type only
        step -= 1
    return {name: max(losses[name], key=losses[name].__getitem__) for name in names[::step][:n]}


def measure_trust(job: Survey, damage: str, losses: Losses, n: int) -> Trust:
    """Quantize ``n`` tensors, one at a time, and compare the KL of each with what the damage model says."""
    from scipy.stats import spearmanr

    sample = sample_tensors({name: losses[name] for name in job.menu}, n)
    found = measured_alone(job, {name: [entry] for name, entry in sample.items()})
    measured = {name: kl for name, _, kl in found}
    ours = [losses[name][entry] for name, entry in sample.items()]
    rho = float(spearmanr(ours, [measured[name] for name in sample]).statistic) if len(sample) > 2 else 1.0
    return Trust(damage, rho, len(sample), measured)


def require_trust(trust: Trust) -> None:
    """Raise RecipeError for a damage model that does not rank tensors as measured KL does."""
    if not trust.rho >= TRUSTED:
        raise RecipeError(
            f"allocate.damage: {trust.damage} ranks {trust.tensors} sampled tensors unlike measured KL (Spearman "
            f"{trust.rho:.2f}, needed {TRUSTED}); choose another such as kl, or --set allocate.trust=0 to go on"
        )


def elect(
    job: Survey, levels: Levels, units: Sequence[Unit], candidates: Mapping[str, Sequence[int]]
) -> tuple[str, dict[str, float]]:
    """Which of some plans has the least KL when it is carried out, and the KL of each: proposed is not decided.

    Measured on rows that no damage model has looked at, with the original model's statistics for all.

    Args:
        candidates: by who proposes it, the entry of each unit.
    """
    meter = KLMeter(job.dense_model(), unseen_rows(job)[-_HELD_OUT:])
    found: dict[tuple[int, ...], float] = {}
    for done, choice in enumerate(candidates.values(), 1):
        if (key := tuple(choice)) not in found:
            wanted = {n: u.entries[i] for u, i in zip(units, choice) for n in u.names}
            levels.make({n: [e] for n, e in wanted.items()})
            found[key] = meter.measure({n: levels.dense(n, e) for n, e in wanted.items()})
        job.progress("Comparing plans", done, len(candidates))
    scores = {by: found[tuple(choice)] for by, choice in candidates.items()}
    return min(scores, key=scores.__getitem__), scores


def unseen_rows(job: Survey) -> list[Tensor]:
    """Calibration rows from the end, as many as their probabilities fit in memory; damage models look at the first."""
    assert job.text is not None
    rows = job.rows(len(job.text.tokens))
    vocabulary = job.streamed.model.get_input_embeddings().weight.shape[0]
    return rows[-max(4 + _HELD_OUT, int(_LOGIT_BYTES // (len(rows[0]) * vocabulary * 4))) :]


def search(
    job: Survey, levels: Levels, units: Sequence[Unit], windows: Sequence[Sequence[int]], start: Sequence[int],
    budget: int, schedule: Schedule,
) -> tuple[list[int], dict[str, Any]]:
    """EvoPress from a solution, within a window of entries for each unit; and what came of it.

    The result is kept only if it beats the start on rows that the search never saw.
    """
    levels.make({n: [u.entries[i] for i in w] for u, w in zip(units, windows) for n in u.names})
    first = tuple(w.index(i) for w, i in zip(windows, start))
    rows = unseen_rows(job)
    meter = KLMeter(job.dense_model(), rows)

    def weights(choice: Choice) -> Mapping[str, Tensor]:
        return {n: levels.dense(n, u.entries[w[i]]) for u, w, i in zip(units, windows, choice) for n in u.names}

    meter.rebase(weights(first))

    def fitness(choice: Choice, picked: Sequence[int]) -> Tensor:
        changed = [u for u, (a, b) in enumerate(zip(first, choice)) if a != b]
        return meter.by_row({
            n: levels.dense(n, units[u].entries[windows[u][choice[u]]]) for u in changed for n in units[u].names
        }, picked)

    found = evolve(
        first, [[u.costs[i] for i in w] for u, w in zip(units, windows)], budget, fitness, len(rows) - _HELD_OUT,
        schedule=schedule, seed=job.seed, progress=job.progress,
    )
    held = range(len(rows) - _HELD_OUT, len(rows))
    before, after = fitness(first, held).mean(), fitness(found.choice, held).mean()
    kept = bool(after < before)
    choice = found.choice if kept else first
    facts = _facts(found, float(before), float(after), kept)
    return [w[i] for w, i in zip(windows, choice)], facts


def _facts(found: Evolved, before: float, after: float, kept: bool) -> dict[str, Any]:
    return {
        "accepted": found.accepted, "moved": found.moved if kept else 0, "generations": len(found.history),
        "held_out_before": before, "held_out_after": after, "kept": kept,
    }


def windows_around(
    units: Sequence[Unit], losses: Sequence[Sequence[float]], start: Sequence[int]
) -> list[list[int]]:
    """For each unit the entry it starts from and the next ones up and down that are worth their bytes."""
    ladders = [[o.index for o in undominated(u.costs, e)] for u, e in zip(units, losses)]
    places = [ladder.index(i) for ladder, i in zip(ladders, start)]
    return [ladder[max(p - 1, 0) : p + 2] for ladder, p in zip(ladders, places)]


class Levels:
    """Tensors quantized at entries of the menu, each alone, made when they are first asked for and kept packed."""

    def __init__(self, job: Survey) -> None:
        self._job = job
        self._packed: dict[tuple[str, str], dict[str, Tensor]] = {}

    def make(self, wanted: Mapping[str, Sequence[str]]) -> None:
        """See that these are there: one pass over the model for all that are not."""
        todo = {n: [e for e in dict.fromkeys(entries) if (n, e) not in self._packed] for n, entries in wanted.items()}
        if todo := {n: entries for n, entries in todo.items() if entries}:
            for name, entry, made in self._job.quantized(todo):
                self._packed[name, entry] = made.pack()

    def dense(self, name: str, entry: str) -> Tensor:
        return QuantizedTensor.unpack(self._packed[name, entry], self._job.layout(name, entry)).dequantize()

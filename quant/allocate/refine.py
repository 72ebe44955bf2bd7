"""What measured KL says about a damage model and its solution: a gate of trust, and a search from the solution."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewbits.calibration.meter import KLMeter
from fewbits.calibration.sensitivity import measured_alone, single_meter
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

    rho: float
    tensors: int
    measured: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {"spearman": self.rho, "tensors": self.tensors}


def sample_tensors(job: Survey, n: int) -> dict[str, str]:
    """``n`` tensors spread over depth and type, each with the cheapest entry of its menu, where damage is clearest."""
    names = list(job.inside().menu)
    step = max(1, len(names) // n)
    while step > 1 and len(names) > 7 and step % 7 == 0:  # a stride of whole blocks would see one type only
        step -= 1
    picked = names[::step][:n]
    return {name: next(iter(job.menu[name])) for name in picked}


def measure_trust(job: Survey, losses: Losses, n: int) -> Trust:
    """Quantize ``n`` tensors, one at a time, and compare the KL of each with what the damage model says."""
    from scipy.stats import spearmanr

    sample = sample_tensors(job, n)
    meter = single_meter(job)
    wanted = {name: [entry] for name, entry in sample.items()}
    measured = {name: found for name, _, found in measured_alone(job, meter, wanted)}
    ours = [losses[name][entry] for name, entry in sample.items()]
    rho = float(spearmanr(ours, [measured[name] for name in sample]).statistic) if len(sample) > 2 else 1.0
    return Trust(rho, len(sample), measured)


def require_trust(trust: Trust, damage: str) -> None:
    """Raise RecipeError for a damage model that does not rank tensors as measured KL does."""
    if not trust.rho >= TRUSTED:
        raise RecipeError(
            f"allocate.damage: {damage} ranks {trust.tensors} sampled tensors unlike measured KL (Spearman "
            f"{trust.rho:.2f}, needed {TRUSTED}); choose another such as kl, or --set allocate.trust=0 to go on"
        )


def search(
    job: Survey, units: Sequence[Unit], losses: Sequence[Sequence[float]], start: Sequence[int], budget: int,
    schedule: Schedule,
) -> tuple[list[int], dict[str, Any]]:
    """EvoPress from a solution, each unit one level up or down of where it starts; and what came of it.

    The result is kept only if it beats the start on rows that the search never saw.
    """
    ladders = [[o.index for o in undominated(u.costs, e)] for u, e in zip(units, losses)]
    places = [ladder.index(i) for ladder, i in zip(ladders, start)]
    windows = [ladder[max(p - 1, 0) : p + 2] for ladder, p in zip(ladders, places)]
    levels = _Levels(job, {n: [u.entries[i] for i in w] for u, w in zip(units, windows) for n in u.names})
    first = tuple(w.index(i) for w, i in zip(windows, start))
    assert job.text is not None
    rows = job.rows(len(job.text.tokens))
    vocabulary = job.streamed.model.get_input_embeddings().weight.shape[0]
    limit = max(4 + _HELD_OUT, int(_LOGIT_BYTES // (len(rows[0]) * vocabulary * 4)))
    rows = rows[-limit:]  # the first ones are what the damage model has seen
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


class _Levels:
    """The recipe's quantizer applied to every tensor at every level that the search can reach; kept packed."""

    def __init__(self, job: Survey, wanted: Mapping[str, Sequence[str]]) -> None:
        self._menu = job.menu
        self._packed: dict[tuple[str, str], dict[str, Tensor]] = {}
        for name, entry, made in job.quantized(wanted):
            self._packed[name, entry] = made.pack()

    def dense(self, name: str, entry: str) -> Tensor:
        return QuantizedTensor.unpack(self._packed[name, entry], self._menu[name][entry]).dequantize()

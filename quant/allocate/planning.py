"""From a budget to a plan: survey the model once, then solve for as many budgets as are asked."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fewbits.calibration.data import CalibrationSet
from fewbits.calibration.sensitivity import DAMAGE, WEIGHTS_ONLY, measure
from fewbits.calibration.stored import StoredStats
from fewbits.calibration.stream import StreamedModel
from fewbits.calibration.survey import Losses, Progress, Survey
from fewbits.quant.allocate.budget import Footprint, Measure, smallest
from fewbits.quant.allocate.estimate import RunEstimate, estimate_run
from fewbits.quant.allocate.evopress import Schedule
from fewbits.quant.allocate.knapsack import Solution, solve
from fewbits.quant.allocate.menu import ENGINES, Menu, Unit, build_menu, build_units, without_idle_sorting
from fewbits.quant.allocate.predict import Prediction, in_nats, predict_kl, prior
from fewbits.quant.allocate.refine import Levels, Trust, elect, measure_trust, require_trust, search, windows_around
from fewbits.quant.checkpoint import file_sizes
from fewbits.quant.errors import BudgetError, RecipeError, nearest
from fewbits.quant.formats import layout_name
from fewbits.quant.plan import Assignment, assign, totals
from fewbits.quant.prepare import load_text
from fewbits.quant.recipe import Budget, Recipe
from fewbits.quant.types import Layout, nominal_bits

PLAN_VERSION = 1
UNIFORM = "uniform"
"""Rival that proposes one entry for all, the largest that fits."""


@dataclass(frozen=True)
class Plan:
    """A layout for every tensor, what it takes and what it is predicted to cost.

    Attributes:
        recipe: the recipe with its ``plan`` filled in: quantizing with it carries the plan out.
        facts: one record a tensor: name, shape, format, bits per weight, bytes, and its damage where known.
        bytes: of the weight files.
        prior: what the scaling law says from parameters and bits alone.
        predicted: KL and its band, from the damage.
        footprint: bytes of memory to run it, where the budget was one of memory.
        price: nats that one more byte would save.
        trust: how well the damage model ranks tensors, where that was asked for.
        search: what a refinement changed.
        election: KL measured of each plan that was proposed, the least of which is this one.
        run: time and memory that carrying it out will take, where that was asked for.
        warnings: what the calibration lint found.
    """

    recipe: Recipe
    facts: list[dict[str, Any]]
    bits_per_weight: float
    bits_per_weight_total: float
    bytes: int
    damage: float
    prior: Prediction
    predicted: Prediction | None = None
    footprint: Footprint | None = None
    price: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    trust: Trust | None = None
    search: dict[str, Any] | None = None
    election: dict[str, float] | None = None
    run: RunEstimate | None = None
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {
            "version": PLAN_VERSION, "recipe": self.recipe.name,
            "budget": self.recipe.budget.model_dump(exclude_none=True),
            "bits_per_weight": self.bits_per_weight, "bits_per_weight_total": self.bits_per_weight_total,
            "bytes": self.bytes, "damage": self.damage, "prior": self.prior.to_json(),
            "predicted": None if self.predicted is None else self.predicted.to_json() | {"damage": self.damage},
            "footprint": None if self.footprint is None else dict(self.footprint.__dict__, total=self.footprint.total),
            "trust": None if self.trust is None else self.trust.to_json(), "search": self.search,
            "election": self.election, "run": None if self.run is None else self.run.to_json(),
            "seconds": self.seconds, "warnings": self.warnings, "tensors": self.facts,
        }


class Planner:
    """Everything about a model that plans for it need, gathered once.

    Raises:
        BudgetError: the recipe's budget is below what is reachable; said before anything is calibrated.
        RecipeError: an unknown damage model, or a menu that does not fit the engine or the model.
    """

    def __init__(
        self, streamed: StreamedModel, recipe: Recipe, *, seed: int = 0, progress: Progress | None = None
    ) -> None:
        self.streamed, self.recipe, self.seed = streamed, recipe, seed
        self._progress = progress or (lambda what, done, total: None)
        want = recipe.allocate
        for key, got in [("damage", want.damage), *(("rivals", r) for r in want.rivals)]:
            if got not in DAMAGE and (key, got) != ("rivals", UNIFORM):
                raise RecipeError(f"allocate.{key}: got {got!r}, {nearest(got, list(DAMAGE))}")
        for key, chosen in [("refine", want.refine != "none"), ("rivals", bool(want.rivals))]:
            if want.unit == "columns" and chosen:
                raise RecipeError(f"allocate.{key}: got {getattr(want, key)!r} with allocate.unit = 'columns', needed "
                                  "whole tensors to compare; leave it out, or set the unit to 'tensor'")
        self.menu: Menu = build_menu(recipe, streamed)
        self._base = assign(recipe.model_copy(update={"plan": {}}), streamed)
        self._seconds: dict[str, float] = {}
        self._warnings: list[str] = []
        self.losses: Losses = {}
        self.trust: Trust | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self.units: list[Unit] = []
        self.shares: dict[str, list[float]] = {}
        self.require_reachable(recipe.budget)

    def require_reachable(self, budget: Budget) -> None:
        """Raise BudgetError where the budget is below the cheapest choice, naming the smallest that is reachable."""
        if budget.given:
            Measure(budget, self.streamed).refuse(smallest(self.menu, self._base))

    @property
    def needs_text(self) -> bool:
        """Whether the damage model looks at more than weights, or columns are to be sorted by their inputs."""
        want = self.recipe.allocate
        return bool(want.rivals) or want.damage not in WEIGHTS_ONLY or want.unit == "columns"

    def allocation(
        self, text: CalibrationSet | None, stored: StoredStats | None, points: Sequence[tuple[float, float]]
    ) -> dict[str, Any]:
        """The plan for the recipe's own budget as a run records it: formats by name, and what is predicted."""
        self.survey(text, stored)
        plan = self.plan(self.recipe.budget, points)
        return {"formats": plan.recipe.plan, "damage": plan.damage, "predicted": plan.to_json()["predicted"],
                "election": plan.election}

    def survey(self, text: CalibrationSet | None, stored: StoredStats | None = None) -> None:
        """Find what every entry of the menu does to every tensor.

        Args:
            text: calibration rows; None for damage models that look at weights alone.
            stored: statistics on disk, to be reused or kept, or None.

        Raises:
            RecipeError: measured KL does not bear the damage model out.
        """
        start = time.monotonic()
        want, self._kept = self.recipe.allocate, stored is not None
        if stored is None and text is not None and (
            want.trust or want.refine != "none" or want.rivals or want.damage == "measured"
        ):  # several passes will read it
            self._folder = tempfile.TemporaryDirectory(prefix="fewbits-")
            stored = StoredStats(Path(self._folder.name), {})
        inside = {n: own for n, own in self.menu.items() if self.streamed.block_index(n) is not None}
        ends = {n: own for n, own in self.menu.items() if n not in inside}
        self.job = job = Survey(self.streamed, self.recipe, inside, text, stored, self.seed, self._progress, ends)
        self._warnings = [] if text is None else list(text.warnings)
        self.losses = measure(job, want.damage)
        self.shares = job.shares() if want.unit == "columns" else {}
        groups = job.groups() if ENGINES[want.target].fused else []
        self.units = build_units(self.menu, self.streamed, groups, self.recipe)
        self._seconds["survey"] = time.monotonic() - start
        self._levels = Levels(job)
        self._rivals = {r: measure(job, r) for r in want.rivals if r != UNIFORM}
        if text is not None and (want.trust or want.damage == "measured"):
            start = time.monotonic()
            proxy = "fisher" if want.damage == "measured" else want.damage  # measured by itself, so that this is free
            self.trust = measure_trust(job, proxy, measure(job, proxy), want.trust or len(inside))
            self._seconds["trust"] = time.monotonic() - start
            if want.trust:
                require_trust(self.trust)

    def estimate(self, plan: Plan) -> RunEstimate:
        """Time and memory that quantizing with a plan will take on this machine."""
        job, recipe = self.job, plan.recipe
        text = job.text
        if text is None and (recipe.make_quantizer().needs_stats or recipe.sorts_columns):
            text, _ = load_text(recipe, self.streamed, self.seed, held_out=False)
        return estimate_run(self.streamed, recipe, assign(recipe, self.streamed), text, stored=self._kept)

    def plan(self, budget: Budget, points: Sequence[tuple[float, float]] = ()) -> Plan:
        """The plan with the least damage within a budget.

        Args:
            points: ``(damage, measured KL)`` of earlier runs on this model, for the prediction.

        Raises:
            BudgetError: it cannot be met.
        """
        start = time.monotonic()
        budgeted = Measure(budget, self.streamed)
        budgeted.refuse(smallest(self.menu, self._base))
        units, losses, solution, chosen, spare = self._solve(budgeted)
        choice, search_facts, election = list(solution.choice), None, None
        want, seconds = self.recipe.allocate, {**self._seconds, "allocation": time.monotonic() - start}
        start = time.monotonic()
        if want.rivals:
            choice, election = self._elect(budgeted, choice, spare)
        if want.refine == "evopress":
            choice, search_facts = search(
                self.job, self._levels, units, windows_around(units, losses, choice), choice, spare,
                Schedule(generations=want.generations, offspring=want.offspring),
            )
        if want.rivals or search_facts:
            chosen = self._assignment(units, choice)
            seconds["measuring plans"] = time.monotonic() - start
        facts = chosen.facts(self.streamed)
        by_name = {fact["name"]: fact for fact in facts}
        for unit, i in zip(units, choice):
            for name in unit.names:
                by_name[name]["damage"] = by_name[name].get("damage", 0.0) + (
                    self._part(unit, name) * self.losses[name][unit.entries[i]])
        blocks, everything = totals(facts)
        # by name, as a resumed run reads them back
        formats = {name: layout_name(layout) for name, layout in sorted(chosen.layouts.items())}
        recipe = self.recipe.model_copy(update={"plan": formats, "budget": budget})
        damage = sum(e[i] for e, i in zip(losses, choice))
        model = self.recipe.allocate.damage
        return Plan(
            recipe, facts, blocks, everything, sum(file_sizes(chosen.shards(self.streamed))), damage,
            self._prior(chosen),
            predict_kl(damage, model, points) if in_nats(model) or points else None,
            budgeted.footprint(chosen) if budgeted.kind == "fits_in" else None, solution.price,
            seconds, self.trust, search_facts, election,
            warnings=self._warnings,
        )

    def _by_unit(self, units: Sequence[Unit], losses: Losses) -> list[list[float]]:
        return [[sum(self._part(u, n) * losses[n][e] for n in u.names) for e in u.entries] for u in units]

    def _part(self, unit: Unit, name: str) -> float:
        """The share of a tensor's damage that falls on a unit: all of it, or that of the columns that the unit is."""
        return 1.0 if unit.columns is None else self.shares[name][unit.columns[0] // self.recipe.allocate.column_group]

    def _elect(self, budgeted: Measure, choice: list[int], spare: int) -> tuple[list[int], dict[str, float]]:
        """The best of this damage model's plan and its rivals', by measured KL."""
        want = self.recipe.allocate
        candidates = {want.damage: choice}
        for rival in want.rivals:
            if rival != UNIFORM:
                losses = self._by_unit(self.units, self._rivals[rival])
                candidates[rival] = list(self._within(budgeted, self.units, losses)[0].choice)
            elif (uniform := self._uniform(spare)) is not None:
                candidates[rival] = uniform
        winner, scores = elect(self.job, self._levels, self.units, candidates)
        return candidates[winner], scores

    def _uniform(self, spare: int) -> list[int] | None:
        """The largest entry that all units can have within the budget, or None."""
        shared = [e for e in self.units[0].entries if all(e in u.entries for u in self.units)]
        plans = [[u.entries.index(e) for u in self.units] for e in shared]
        costs = {sum(u.costs[i] for u, i in zip(self.units, plan)): plan for plan in plans}
        return costs[max(fits)] if (fits := [c for c in costs if c <= spare]) else None

    def _prior(self, chosen: Assignment) -> Prediction:
        runs = [(chosen.targets[n].shape[0] * columns, nominal_bits(fmt))
                for n, layout in chosen.layouts.items() for fmt, columns in layout.runs]
        return prior(sum(weights for weights, _ in runs), None, runs)

    def _solve(self, measure: Measure) -> tuple[list[Unit], list[list[float]], Solution, Assignment, int]:
        """The units and their losses, the best choice, what it means, and the bytes that the units may take.

        Solved again without the permutations that turned out to be of no use: the same choice costs less then, so the
        next one is no worse, and there are fewer units each time.
        """
        units = self.units
        while True:
            losses = self._by_unit(units, self.losses)
            solution, chosen, spare = self._within(measure, units, losses)
            fewer = without_idle_sorting(units, solution.choice)
            if len(fewer) == len(units):
                return units, losses, solution, chosen, spare
            units = fewer

    def _within(
        self, measure: Measure, units: list[Unit], losses: list[list[float]]
    ) -> tuple[Solution, Assignment, int]:
        """Solve, and where a file's header came out longer than foreseen, again with that much less.

        Also returns the bytes that the units may take.
        """
        cheapest = self._assignment(units, [min(range(len(u.costs)), key=u.costs.__getitem__) for u in units])
        fixed = measure.cost(cheapest) - sum(min(u.costs) for u in units)
        spare = measure.limit(cheapest) - fixed
        while True:
            solution = solve([u.costs for u in units], losses, spare)
            chosen = self._assignment(units, solution.choice)
            over = measure.cost(chosen) - measure.limit(chosen)
            if over <= 0:
                return solution, chosen, spare
            spare -= over

    def _assignment(self, units: Sequence[Unit], choice: Sequence[int]) -> Assignment:
        parts: dict[str, list[Layout]] = {}
        for unit, i in zip(units, choice):
            for name in unit.names:
                parts.setdefault(name, []).append(unit.part(self.menu[name][unit.entries[i]]))
        return replace(self._base, layouts=self._base.layouts | {name: Layout.join(p) for name, p in parts.items()})


def read_plan(path: Path, recipe: Recipe, streamed: StreamedModel) -> Recipe:
    """The recipe that carries out a plan file, as ``fewbits plan`` wrote it or a person edited it.

    Raises:
        RecipeError: not a plan, or it names a tensor that the model does not have.
        FormatError: a format is unknown or does not fit.
    """
    try:
        data = json.loads(path.read_text())
        rows = {t["name"]: t["format"] for t in data["tensors"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"--plan {path}: is not a plan ({type(error).__name__}: {error}); write one with "
                          "fewbits plan") from error
    formats = {}
    for name, fmt in rows.items():
        if name in streamed.targets and not _is_dtype(fmt):
            formats[name] = fmt
        elif not _is_dtype(fmt):
            raise RecipeError(f"--plan {path}: {name}: the model has no such tensor; "
                              f"{nearest(name, list(streamed.targets))}")
    if not formats:
        raise RecipeError(f"--plan {path}: quantizes nothing; give a tensor a format such as int4_g64")
    return recipe.model_copy(update={"plan": formats})


def _is_dtype(name: object) -> bool:
    import torch

    return isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)


def parse_range(text: str) -> list[float]:
    """``2:5:0.25`` or ``2.5,3,4``: budgets in bits per weight.

    Raises:
        BudgetError: not a range.
    """
    try:
        if ":" in text:
            low, high, step = (float(p) for p in text.split(":"))
            if step > 0 and 0 < low <= high:
                return [round(low + i * step, 6) for i in range(int((high - low) / step + 1e-9) + 1)]
        else:
            values = [float(p) for p in text.split(",")]
            if all(v > 0 for v in values):
                return values
    except ValueError:
        pass
    raise BudgetError(f"--bpw: got {text!r}, needed low:high:step such as 2:5:0.25, or a list such as 2.5,3,4")

"""Measured KL decides: between plans that damage models propose, and in the search that goes on from one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.calibration.meter import KLMeter
from fewbits.calibration.sensitivity import DAMAGE
from fewbits.calibration.stream import StreamedModel
from fewbits.calibration.survey import Losses, Survey
from fewbits.quant.allocate import planning
from fewbits.quant.allocate.planning import Planner
from fewbits.quant.allocate.refine import unseen_rows, windows_around
from fewbits.quant.errors import RecipeError
from fewbits.quant.formats import layout_name
from fewbits.quant.prepare import load_text
from fewbits.quant.recipe import Budget, load_recipe
from fewbits.quant.source import open_source

_QUICK = {"calibration.samples": 24, "calibration.seqlen": 32, "allocate.formats": ["int2_g32", "int4_g32", "int8_g32"]}


def _planner(path: Path, recipe: str = "auto", **overrides: object) -> Planner:
    settings = {**_QUICK, **{k.replace("__", "."): v for k, v in overrides.items()}}
    chosen = load_recipe(recipe, settings)
    streamed = StreamedModel(open_source(path), dtype=torch.float32, device=torch.device("cpu"))
    planner = Planner(streamed, chosen)
    text, _ = load_text(chosen, streamed, 0, held_out=False)
    planner.survey(text)
    return planner


def _measured(planner: Planner, choice: list[int], rows: int) -> float:
    """KL of a plan on the last rows, every tensor quantized anew."""
    job = planner.job
    wanted = {n: [u.entries[i]] for u, i in zip(planner.units, choice) for n in u.names}
    weights = {name: made.dequantize() for name, _, made in job.quantized(wanted)}
    return KLMeter(job.dense_model(), unseen_rows(job)[-rows:]).measure(weights)


def test_the_plan_with_the_least_measured_kl_ships(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    planner = _planner(tiny("llama"), allocate__rivals=["weights", "uniform"])
    worst = {n: {e: -d for e, d in own.items()} for n, own in planner.losses.items()}  # asks for the fewest bits
    planner._rivals["weights"] = worst
    seen: dict[str, list[int]] = {}
    elect = planning.elect

    def watched(job, levels, units, candidates):
        seen.update(candidates)
        return elect(job, levels, units, candidates)

    monkeypatch.setattr(planning, "elect", watched)
    plan = planner.plan(Budget(bpw=5.5))
    assert plan.election is not None and set(plan.election) == set(seen) == {"measured", "weights", "uniform"}
    for by, choice in seen.items():
        assert plan.election[by] == pytest.approx(_measured(planner, choice, 6), rel=1e-4)
    assert plan.election["weights"] > 5 * plan.election["measured"]
    winner = min(plan.election, key=plan.election.__getitem__)
    entries = {n: u.entries[i] for u, i in zip(planner.units, seen[winner]) for n in u.names}
    assert plan.recipe.plan == {n: layout_name(planner.menu[n][e]) for n, e in entries.items()}
    assert plan.bits_per_weight <= 5.5
    # were the main damage model the wrong one, its rival would win
    planner.losses, planner._rivals["weights"] = worst, planner.losses
    assert planner.plan(Budget(bpw=5.5)).recipe.plan == plan.recipe.plan


def test_uniform_bits_compete_with_the_most_that_fits(tiny) -> None:
    planner = _planner(tiny("llama"))
    costs = {e: sum(u.costs[i] for u in planner.units) for i, e in enumerate(planner.units[0].entries)}
    assert planner._uniform(costs["int4_g32"]) == [1] * len(planner.units)
    assert planner._uniform(costs["int8_g32"] - 1) == [1] * len(planner.units)
    assert planner._uniform(costs["int2_g32"] - 1) is None


def test_an_unknown_rival_is_refused(tiny) -> None:
    with pytest.raises(RecipeError, match=r"allocate\.rivals: got 'fischer'.*fisher"):
        _planner(tiny("llama"), allocate__rivals=["fischer"])


def test_a_proxy_that_ranks_unlike_measured_kl_is_refused(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = DAMAGE["hessian"]
    planner = _planner(tiny("llama"), allocate__damage="fisher", allocate__rivals=[], allocate__trust=8)
    assert planner.trust is not None and planner.trust.tensors == 8 and planner.trust.rho > 0.6

    def upside_down(job: Survey) -> Losses:
        return {n: {e: 1 / d for e, d in own.items()} for n, own in honest(job).items()}

    monkeypatch.setitem(DAMAGE, "hessian", upside_down)
    with pytest.raises(RecipeError, match=r"allocate\.damage: hessian ranks 14 sampled tensors unlike.*needed 0\.6"):
        _planner(tiny("llama"), allocate__damage="hessian", allocate__rivals=[], allocate__trust=14)
    assert _planner(tiny("llama"), allocate__damage="hessian", allocate__rivals=[]).trust is None


def test_the_default_says_how_well_its_proxy_ranks(tiny) -> None:
    trust = _planner(tiny("llama"), allocate__rivals=[]).trust
    assert trust is not None and trust.damage == "fisher" and trust.tensors == 14 == len(trust.measured)


def test_evopress_repairs_a_bad_start(tiny) -> None:
    """From a plan that starves the tensors that matter, the search finds a better one of no more bytes."""
    planner = _planner(tiny("llama"), "evopress", allocate__generations=6, allocate__offspring=8)
    sizes = {n: t.shape[0] * t.shape[1] for n, t in planner.streamed.targets.items()}
    planner.losses = {n: {e: d / sizes[n] ** 2 for e, d in own.items()} for n, own in planner.losses.items()}
    plan = planner.plan(Budget(bpw=4.7))
    assert plan.search is not None and plan.search["generations"] > 0
    assert plan.bits_per_weight <= 4.7
    if plan.search["kept"]:
        assert plan.search["held_out_after"] < plan.search["held_out_before"]
    else:
        assert plan.search["moved"] == 0


def test_windows_hold_what_is_worth_its_bytes(tiny) -> None:
    planner = _planner(tiny("llama"))
    losses = planner._by_unit(planner.units, planner.losses)
    windows = windows_around(planner.units, losses, [1] * len(planner.units))
    assert all(w == [0, 1, 2] for w in windows)
    losses[0] = [losses[0][0], losses[0][1], losses[0][1] * 2]  # 8 bits worse than 4: nobody pays for that
    assert windows_around(planner.units, losses, [1] * len(planner.units))[0] == [0, 1]


def test_an_interrupted_survey_goes_on_where_it_stopped(tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fewbits.calibration.meter as meter

    overrides = {**_QUICK, "budget.bpw": 5.0, "allocate.rivals": []}
    whole = fewbits.plan(tiny("llama"), overrides=overrides)
    measure, calls = meter.KLMeter.measure, []

    def counted(self, weights):
        if len(calls) == 9 and not interrupted:
            interrupted.append(True)
            raise KeyboardInterrupt
        calls.append(1)
        return measure(self, weights)

    interrupted: list[bool] = []
    monkeypatch.setattr(meter.KLMeter, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        fewbits.plan(tiny("llama"), overrides=overrides, stats=tmp_path / "stats")
    again = fewbits.plan(tiny("llama"), overrides=overrides, stats=tmp_path / "stats")
    assert again.facts == whole.facts
    measured = len(calls)
    third = fewbits.plan(tiny("llama"), overrides=overrides, stats=tmp_path / "stats")
    assert third.facts == whole.facts and len(calls) == measured  # nothing is found out twice
    assert measured == 2 * len(again.recipe.plan)  # two entries of each tensor

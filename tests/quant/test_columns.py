"""Bits for sorted groups of columns (BAQ): the closed form, the knapsack over groups, the way to a checkpoint."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fewbits
from fewbits.calibration.feedback import column_shares, conditional_curvature
from fewbits.calibration.sensitivity import measure
from fewbits.calibration.stream import StreamedModel
from fewbits.calibration.survey import Survey
from fewbits.quant.allocate.knapsack import solve
from fewbits.quant.allocate.menu import Unit, build_menu, build_units, without_idle_sorting
from fewbits.quant.allocate.planning import Planner
from fewbits.quant.errors import BudgetError, FewbitsError, FormatError, RecipeError
from fewbits.quant.formats import layout_name, parse_layout
from fewbits.quant.prepare import load_text
from fewbits.quant.quantizers.gptq import GPTQ
from fewbits.quant.recipe import Budget, load_recipe
from fewbits.quant.source import open_source
from fewbits.quant.types import LayerStats, Layout, nbytes, proxy_loss
from fewbits.serving.transformers import load
from tests.conftest import save_tiny_model

torch.set_num_threads(1)

_QUICK = {"calibration.samples": 4, "calibration.seqlen": 32, "calibration.dtype": "float32",
          "allocate.column_group": 32}


def outlier_stats(columns: int = 256, seed: int = 0) -> LayerStats:
    """Correlated inputs of log-normal sizes, one in sixteen a hundred times larger, in no order."""
    draw = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=draw) / columns**0.5 + 2 * torch.eye(columns)
    sizes = torch.exp(0.5 * torch.randn(columns, generator=draw))
    sizes[torch.randperm(columns, generator=draw)[: columns // 16]] *= 100
    x = torch.randn(4 * columns, columns, generator=draw) @ mix * sizes
    return LayerStats(x.T @ x, len(x))


def planner_of(path: Path, **overrides: object) -> Planner:
    recipe = load_recipe("baq", {**_QUICK, **{k.replace("__", "."): v for k, v in overrides.items()}})
    return Planner(StreamedModel(open_source(path), dtype=torch.float32, device=torch.device("cpu")), recipe)


def surveyed(path: Path, **overrides: object) -> Planner:
    planner = planner_of(path, **overrides)
    planner.survey(load_text(planner.recipe, planner.streamed, 0, held_out=False)[0])
    return planner


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that one step of one group of columns is under 0.5 % of a budget."""
    return save_tiny_model(tmp_path_factory.mktemp("wide"), "llama", hidden_size=128, intermediate_size=272)


# -- the closed form -----------------------------------------------------------------------------------------------


def test_sensitivities_are_those_of_the_factor_by_original_column() -> None:
    """``prod D_j = det(H + damping)``; and columns in another order have the same D, each its own."""
    stats = outlier_stats(64)
    conditional, importance, _ = conditional_curvature(stats)
    damped = stats.hessian.double() + 0.01 * float(importance.mean()) * torch.eye(64)
    assert float(conditional.double().log().sum()) == pytest.approx(float(torch.logdet(damped)), abs=1e-3)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    again, _, _ = conditional_curvature(stats.permuted(order))
    torch.testing.assert_close(again, conditional[order], rtol=1e-3, atol=0)


def test_a_dead_input_has_no_share() -> None:
    stats = outlier_stats(64)
    xtx = stats.xtx.clone()
    xtx[:, 7] = xtx[7] = 0
    dead = LayerStats(xtx, stats.n_tokens)
    assert float(conditional_curvature(dead)[0][7]) == 0 and int(dead.column_order()[-1]) == 7
    assert column_shares(LayerStats(torch.zeros(64, 64), 3), 32) == [0, 0]


def test_finely_spaced_widths_reach_equal_loss_and_the_gain_of_the_closed_form() -> None:
    """Without rounding to whole bits: ``c_j 4^-R_j`` is one value for all, and the gain is GM / AM."""
    c = torch.tensor(column_shares(outlier_stats(), 32), dtype=torch.float64)
    steps, mean = 200, 4
    widths = torch.arange(0, 10 * steps + 1, dtype=torch.float64) / steps
    found = solve([list(range(len(widths)))] * len(c), [(k * 4.0**-widths).tolist() for k in c], mean * steps * len(c))
    losses = c * 4.0 ** -widths[list(found.choice)]
    assert float(losses.max() / losses.min()) < 4.0 ** (2 / steps)
    uniform = float(c.sum()) * 4.0**-mean
    assert found.loss / uniform == pytest.approx(float(c.log().mean().exp() / c.mean()), rel=1e-3)


def test_sorted_groups_keep_what_groups_as_they_come_lose() -> None:
    """Whole bits at a budget of 3 (spec of the method: about 0.1 against 0.77): groups must be alike inside."""
    stats, group, menu = outlier_stats(512), 32, (2, 3, 4, 5, 6, 8)
    conditional, _, _ = conditional_curvature(stats)

    def gain(order: Tensor) -> float:
        c = [float(part.sum()) for part in conditional[order].split(group)]
        found = solve([menu] * len(c), [[k * 4.0**-b for b in menu] for k in c], 3 * len(c))
        return found.loss / (sum(c) * 4.0**-3)

    assert gain(stats.column_order()) < 0.2
    assert gain(torch.arange(512)) > 0.5


def test_sorted_groups_lose_less_when_they_are_quantized() -> None:
    """GPTQ's own loss at the same bytes: more bits for the first sorted group, against the best of uniform."""
    stats = outlier_stats()
    weight = 0.05 * torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    mixed = parse_layout("perm:int6_g32[32]+int3_g32[128]+int2_g32[96]", 256)
    uniform = parse_layout("int3_g32", 256)
    assert mixed.stored_bytes(64) - 2 * 256 <= uniform.stored_bytes(64)
    lost = {layout.permuted: proxy_loss(weight, GPTQ().quantize(weight, stats, layout)[0], stats)[0]
            for layout in (mixed, uniform)}
    assert lost[True] < 0.5 * lost[False]


# -- what the planner makes of it ------------------------------------------------------------------------------------


def test_costs_of_groups_add_up_to_the_bytes_of_the_merged_layout(wide) -> None:
    """To the byte, for any mixture, the short last group (272 = 8 * 32 + 16) included."""
    planner = planner_of(wide)
    units = build_units(planner.menu, planner.streamed, [], planner.recipe)
    name = "model.layers.1.mlp.down_proj"
    own = [u for u in units if u.names == (name,)]
    assert [u.columns for u in own] == [(s, min(s + 32, 272)) for s in range(0, 272, 32)]
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        pick = torch.randint(len(own[0].entries), (len(own),), generator=draw).tolist()
        layout = Layout.join([u.part(planner.menu[name][u.entries[i]]) for u, i in zip(own, pick)])
        assert sum(u.costs[i] for u, i in zip(own, pick)) == nbytes(layout.codes_storage(128))
        assert layout.permuted and layout.columns == 272
        assert all(a[0] != b[0] for a, b in itertools.pairwise(layout.runs))
        assert layout.stored_bytes(128) == nbytes(layout.codes_storage(128)) + 272 * 2 + 16


def test_baq_judges_groups_by_their_own_columns(tiny) -> None:
    """``c_group = sum_{j in group} D_j sum_i range_i^2 / 24``, columns sorted; both units have one form."""
    planner = surveyed(tiny("llama"), allocate__damage="baq")
    job = Survey(planner.streamed, planner.recipe, planner.menu, None, planner.job.stored, 0, lambda *a: None)
    job.text = planner.job.text
    for block, stats in job.blocks():
        for name, own in stats.items():
            w = block.weights[name]
            spread = float((w.amax(1).clamp(min=0) - w.amin(1).clamp(max=0)).square().sum())
            curvature = conditional_curvature(own)[0][own.column_order()]
            for unit in (u for u in planner.units if u.names == (name,)):
                assert unit.columns is not None
                c = float(curvature[slice(*unit.columns)].sum()) * spread / 24
                for entry, bits in (("int2", 2), ("int4", 4)):
                    damage = planner._part(unit, name) * planner.losses[name][entry]
                    assert damage == pytest.approx(c * 4.0**-bits, rel=1e-4)
    whole = planner_of(tiny("llama"), allocate__unit="tensor", allocate__damage="baq")
    tensors = Survey(whole.streamed, whole.recipe, whole.menu, job.text, None, 0, lambda *a: None)
    for name, entries in measure(tensors, "baq").items():
        for entry, damage in entries.items():
            assert damage == pytest.approx(planner.losses[name][entry], rel=1e-4)


def test_a_plan_is_the_best_of_all_choices(tiny) -> None:
    keep = [f"*.{m}_proj" for m in ("q", "k", "v", "gate", "up", "down")]
    planner = surveyed(tiny("llama"), allocate__formats=["int2", "int3", "int5"], keep=keep)
    assert [u.columns for u in planner.units] == [(0, 32), (32, 64)] * 2
    losses = planner._by_unit(planner.units, planner.losses)
    costs = [u.costs for u in planner.units]
    for share in (0.1, 0.4, 0.8):
        low, high = sum(map(min, costs)), sum(map(max, costs))
        limit = int(low + share * (high - low))
        found = solve(costs, losses, limit)
        best = min(sum(e[i] for e, i in zip(losses, pick)) for pick in itertools.product(range(3), repeat=4)
                   if sum(c[i] for c, i in zip(costs, pick)) <= limit)
        assert found.loss == pytest.approx(best, rel=1e-12)


def test_equal_sensitivities_give_uniform_bits(tiny) -> None:
    planner = planner_of(tiny("llama"), allocate__formats=["int2", "int3", "int4"])
    planner.units = build_units(planner.menu, planner.streamed, [], planner.recipe)
    for name, entries in planner.menu.items():
        rows, columns = planner.streamed.targets[name].shape
        planner.losses[name] = {e: rows * columns * 4.0 ** -own.runs[0][0].code_bits for e, own in entries.items()}
        planner.shares[name] = [32 / columns] * (columns // 32)
    shapes = {n: planner.streamed.targets[n].shape for n in planner.menu}
    stored = sum(parse_layout("int3_g32", k).stored_bytes(n) for n, k in shapes.values())
    exactly = 8 * stored / sum(n * k for n, k in shapes.values())
    plan = planner.plan(Budget(bpw=exactly))  # and no tensor stores a permutation that it has no use for
    assert set(plan.recipe.plan.values()) == {"int3_g32"} and plan.bits_per_weight == exactly


@pytest.mark.parametrize("damage", ["baq", "hessian", "weights"])
def test_budgets_are_met_from_below(wide, damage: str) -> None:
    planner = surveyed(wide, allocate__damage=damage)
    for bpw in (3.2, 3.7, 4.4, 6.1):
        plan = planner.plan(Budget(bpw=bpw))
        assert 0.995 * bpw <= plan.bits_per_weight <= bpw
        assert plan.damage == pytest.approx(sum(f.get("damage", 0) for f in plan.facts))
    assert any("+" in name for name in plan.recipe.plan.values())


def test_what_cannot_be_is_refused(tiny) -> None:
    path = tiny("llama")
    with pytest.raises(RecipeError, match=r"vllm does not read perm:int4_sym_g32 \(model.*q_proj\).*'tensor'"):
        planner_of(path, allocate__target="vllm", allocate__formats=["int4_sym"])
    for unit in ("columns", "tensor"):
        with pytest.raises(RecipeError, match="needs 2 bits or more"):
            planner_of(path, allocate__formats=["int1", "int4"], allocate__unit=unit)
    with pytest.raises(RecipeError, match=r"evopress.*needed whole tensors"):
        planner_of(path, allocate__refine="evopress")
    with pytest.raises(FormatError, match="no format of int4_g64 fits"):
        planner_of(path, allocate__formats=["int4_g64"])
    with pytest.raises(RecipeError, match=r"allocate.column_group: got 48"):
        planner_of(path, allocate__column_group=48)
    with pytest.raises(BudgetError, match=r"smallest that is reachable is 2\.8"):
        planner_of(path, budget__bpw=2.0)


# -- the whole way -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2"])
def test_from_a_budget_to_logits(tiny, tmp_path: Path, family: str) -> None:
    overrides = {**_QUICK, "budget.bpw": 3.9}
    planned = fewbits.plan(tiny(family), recipe="baq", overrides=overrides)
    made = fewbits.quantize(tiny(family), tmp_path / "out", recipe="baq", overrides=overrides)
    files = sum(p.stat().st_size for p in (tmp_path / "out").glob("fewbits-*.safetensors"))
    assert planned.bytes == made.bytes == files
    assert planned.bits_per_weight == made.bits_per_weight and 0.97 * 3.9 <= made.bits_per_weight <= 3.9
    facts = {t["name"]: t["format"] for t in fewbits_inspect(tmp_path / "out")}
    assert {n: f for n, f in facts.items() if n in planned.recipe.plan} == planned.recipe.plan
    assert any(f.startswith("perm:") and "+" in f for f in facts.values())
    ids = torch.arange(3, 43)[None]
    model, dense = load(tmp_path / "out"), load(tmp_path / "out", dequantize=True)
    with torch.no_grad():
        logits = model(ids).logits
        torch.testing.assert_close(logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
        model.save_pretrained(tmp_path / "saved")
        assert torch.equal(load(tmp_path / "saved")(ids).logits, logits)


@pytest.mark.parametrize("budget", [{"size": 172_000}, {"bpw_total": 14.5}])
def test_other_budgets_count_sorted_columns_to_the_byte(tiny, tmp_path: Path, budget: dict[str, float]) -> None:
    (kind, limit), = budget.items()
    made = fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="baq",
                            overrides={**_QUICK, f"budget.{kind}": limit})
    got = made.bytes if kind == "size" else made.bits_per_weight_total
    assert 0.98 * limit <= got <= limit
    assert made.bytes == sum(p.stat().st_size for p in (tmp_path / "out").glob("fewbits-*.safetensors"))
    assert sum(f["bytes"] for f in fewbits_inspect(tmp_path / "out")) < made.bytes


def fewbits_inspect(folder: Path) -> list[dict]:
    from fewbits.quant.inspection import inspect

    return inspect(folder).tensors


def test_a_plan_with_sorted_columns_is_edited_and_carried_out(tiny, tmp_path: Path) -> None:
    """By another quantizer too, which has no use for statistics but to sort by them; then by an engine that cannot."""
    plan = fewbits.plan(tiny("llama"), recipe="baq", overrides={**_QUICK, "budget.bpw": 3.9}).to_json()
    path, edited = tmp_path / "plan.json", "perm:int8_g32[32]+int2_g16[32]"
    name = "model.layers.0.self_attn.q_proj"
    for row in plan["tensors"]:
        row["format"] = {name: edited, "lm_head": "perm:int6_g32"}.get(row["name"], row["format"])
    path.write_text(json.dumps(plan))
    for recipe in ("rtn", "gptq"):
        fewbits.quantize(tiny("llama"), tmp_path / recipe, recipe=recipe, plan=path, overrides=dict(_QUICK))
        written = {t["name"]: t["format"] for t in fewbits_inspect(tmp_path / recipe)}
        assert written[name] == edited and written["lm_head"] == "perm:int6_g32"
        model = load(tmp_path / recipe)
        for module in (model.get_submodule(name), model.lm_head):
            order = module.quantized().permutation
            assert order is not None and not torch.equal(order.long(), torch.arange(64))
    with pytest.raises(RecipeError, match=r"vllm does not read perm:.*\(model.layers.0"):
        fewbits.quantize(tiny("llama"), tmp_path / "no", recipe="rtn", plan=path,
                         overrides={**_QUICK, "allocate.target": "vllm"})


@pytest.mark.parametrize("bad, message", [
    ("perm:int4_g32[32]+int2_g32[64]", "covers 96 columns, the tensor has 64"),
    ("perm:int4_g48", "not a multiple of group_size 48"), ("perm:int4", "format: got 'int4'"),
])
def test_a_layout_that_does_not_fit_is_named(tiny, tmp_path: Path, bad: str, message: str) -> None:
    name = "model.layers.0.self_attn.q_proj"
    (tmp_path / "plan.json").write_text(json.dumps({"tensors": [{"name": name, "format": bad}]}))
    with pytest.raises(FewbitsError, match=f"{name}: .*{message}"):
        fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="rtn", plan=tmp_path / "plan.json", overrides=_QUICK)


def test_an_embedding_is_never_sorted(tiny, tmp_path: Path) -> None:
    rows = {"tensors": [{"name": "model.embed_tokens", "format": "perm:int4_g32"}]}
    (tmp_path / "plan.json").write_text(json.dumps(rows))
    with pytest.raises(FormatError, match=r"model.embed_tokens: .*without perm:"):
        fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="rtn", plan=tmp_path / "plan.json", overrides=_QUICK)


def test_menu_entries_are_whole_tensors(wide) -> None:
    planner = planner_of(wide, allocate__formats=["int3", "int4_g16", "int5_row"])
    entries = build_menu(planner.recipe, planner.streamed)["model.layers.0.mlp.down_proj"]
    assert {e: layout_name(m) for e, m in entries.items()} == {
        "int3": "perm:int3_g32[256]+int3_g16[16]", "int4_g16": "perm:int4_g16",
        "int5_row": "perm:int5_g32[256]+int5_g16[16]",
    }
    small = planner_of(wide, allocate__column_group=128, allocate__formats=["int3"])
    assert layout_name(small.menu["model.layers.0.mlp.up_proj"]["int3"]) == "int3_g128"  # nothing to tell apart


def test_only_groups_that_differ_stay_apart() -> None:
    def units(name: str, groups: int) -> list[Unit]:
        return [Unit((name,), ("int2", "int4"), (10, 20 + g), (32 * g, 32 * g + 32)) for g in range(groups)]

    whole = Unit(("c",), ("int2", "int4"), (5, 9))
    mixed, alike = units("a", 2), units("b", 3)
    found = without_idle_sorting([*mixed, *alike, whole], [0, 1, 1, 1, 1, 0])
    assert found == [*mixed, Unit(("b",), ("int2", "int4"), (30, 63)), whole]
    assert layout_name(found[2].part(parse_layout("perm:int4_g32", 96))) == "int4_g32"
    assert without_idle_sorting(found, [0, 1, 1, 0]) == found


def test_layouts_are_cut_and_joined() -> None:
    layout = parse_layout("perm:int4_g32[64]+int2_g16[48]", 112)
    pieces = [layout.cut(0, 32), layout.cut(32, 80), layout.cut(80, 112)]
    assert [layout_name(p) for p in pieces] == [
        "perm:int4_g32", "perm:int4_g32[32]+int2_g16[16]", "perm:int2_g16"]
    assert Layout.join(pieces) == layout
    rows = parse_layout("int4_row", 32)
    assert len(Layout.join([rows, rows]).runs) == 2  # two rows of parameters are not one
    assert dataclasses.replace(layout, permuted=False) != layout


def test_within_a_matrix_every_matrix_gets_the_same_mean(tiny) -> None:
    """What the paper does: groups compete with those of their own matrix; across matrices nothing moves."""
    within = surveyed(tiny("llama"), allocate__damage="baq-within")
    shares = within.shares
    for name, own in within.losses.items():
        logs = [math.log(share * own["int2"]) for share in shares[name]]
        weights = math.prod(within.streamed.targets[name].shape) / len(logs)
        assert sum(logs) / len(logs) == pytest.approx(math.log(weights * 4.0**-2), abs=1e-6)

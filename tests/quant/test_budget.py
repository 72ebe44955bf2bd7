"""Budgets: met from below to the byte, refused before anything is calibrated, and computed as they are spent."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.calibration.stream import StreamedModel
from fewbits.kernels.linear import QuantEmbedding, TiedHead
from fewbits.quant.allocate.budget import Measure, parse_size
from fewbits.quant.allocate.menu import build_units
from fewbits.quant.allocate.planning import Planner, parse_range
from fewbits.quant.errors import BudgetError, FormatError, RecipeError
from fewbits.quant.recipe import Budget, Recipe, load_recipe
from fewbits.quant.source import open_source
from tests.conftest import save_tiny_model

_QUICK = {"calibration.samples": 4, "calibration.seqlen": 32, "allocate.rivals": []}


@pytest.fixture(scope="module")
def medium(tmp_path_factory: pytest.TempPathFactory):
    """``medium(family) -> Path``: models large enough that one step of one tensor is under 0.5 % of a budget."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            wide = {"n_embd": 128, "n_layer": 12, "n_inner": 256} if family == "gpt2" else {
                "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 6,
            }
            made[family] = save_tiny_model(tmp_path_factory.mktemp(family), family, **wide)
        return made[family]

    return make


def _planner(path: Path, **overrides: object) -> Planner:
    recipe = load_recipe("auto", {**_QUICK, **{k.replace("__", "."): v for k, v in overrides.items()}})
    return Planner(StreamedModel(open_source(path), dtype=torch.float32, device=torch.device("cpu")), recipe)


def _with_made_up_losses(planner: Planner) -> Planner:
    """What a survey would find, without one: the solver and the bytes are what is tested."""
    draw = random.Random(0)
    planner.losses = {}
    for name, entries in planner.menu.items():
        size = planner.streamed.targets[name].shape[0] * planner.streamed.targets[name].shape[1]
        scale = draw.lognormvariate(0, 1)
        planner.losses[name] = {e: scale * size * 4.0 ** -own.runs[0][0].code_bits for e, own in entries.items()}
    planner.units = build_units(planner.menu, planner.streamed, [], planner.recipe)
    return planner


@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2"])
def test_twenty_random_budgets_are_met_from_below(medium, family: str) -> None:
    planner = _with_made_up_losses(_planner(medium(family)))
    draw = random.Random(7)
    for _ in range(20):
        bpw = draw.uniform(2.7, 7.5)
        plan = planner.plan(Budget(bpw=bpw))
        assert 0.995 * bpw <= plan.bits_per_weight <= bpw


@pytest.mark.parametrize("kind", ["bpw", "bpw_total", "size"])
def test_what_is_planned_is_what_is_written(tiny, tmp_path: Path, kind: str) -> None:
    model = tiny("llama-tied")
    value = {"bpw": 4.5, "bpw_total": 4.9, "size": 50_000}[kind]
    overrides = {**_QUICK, f"budget.{kind}": value}
    planned = fewbits.plan(model, overrides=overrides)
    made = fewbits.quantize(model, tmp_path / "out", recipe="auto", overrides=overrides)
    files = sum(p.stat().st_size for p in (tmp_path / "out").glob("fewbits-*.safetensors"))
    assert planned.bytes == made.bytes == files
    assert planned.bits_per_weight == pytest.approx(made.bits_per_weight, abs=1e-12)
    assert planned.bits_per_weight_total == pytest.approx(made.bits_per_weight_total, abs=1e-12)
    got = {"bpw": made.bits_per_weight, "bpw_total": made.bits_per_weight_total, "size": files}[kind]
    assert 0.97 * value <= got <= value
    assert made.predicted is not None and made.measured is not None
    low, high = made.predicted["band"]
    assert low < made.predicted["kl_mean"] < high


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2"])
def test_embedding_and_head_are_candidates_where_their_bytes_count(tiny, family: str) -> None:
    model = tiny(family)
    ends = set(_planner(model, budget__size=10**9).menu) - set(_planner(model, budget__bpw=5.0).menu)
    embedding = "transformer.wte" if family == "gpt2" else "model.embed_tokens"
    assert ends == {embedding} | ({"lm_head"} if family == "llama" else set())
    assert embedding not in _planner(model, budget__size=10**9, keep=["*embed*", "*wte"]).menu
    assert embedding not in _planner(model, budget__size=10**9, allocate__damage="hessian").menu  # not in nats


def test_a_tied_table_is_stored_once_and_read_by_both(tiny, tmp_path: Path) -> None:
    overrides = {**_QUICK, "budget.bpw_total": 5}
    made = fewbits.quantize(tiny("llama-tied"), tmp_path / "out", recipe="auto", overrides=overrides)
    model = fewbits.load(tmp_path / "out")
    assert isinstance(model.get_output_embeddings(), TiedHead)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    stored = sum(p.stat().st_size for p in (tmp_path / "out").glob("fewbits-*.safetensors"))
    weights = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(tiny("llama-tied")).parameters())
    assert made.bytes == stored and made.bits_per_weight_total <= 5
    table = next(f for f in _facts(tmp_path / "out") if f["name"] == "model.embed_tokens")
    assert table["n_tokens"] > 0  # quantized for what the head multiplies it by, and not only to be looked up
    assert 8 * sum(f["bytes"] for f in _facts(tmp_path / "out")) == pytest.approx(made.bits_per_weight_total * weights)


def _facts(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "plan.json").read_text())["tensors"]


@pytest.mark.parametrize(
    "budget, message",
    [({"bpw": 1.0}, "smallest that is reachable is 1.5"), ({"bpw_total": 1.5}, "smallest that is reachable is [12]"),
     ({"size": 1000}, "smallest that is reachable is [0-9]{5,}"),
     ({"fits_in": 1000}, "for the KV cache and activations")],
)
def test_what_cannot_be_reached_is_refused_before_calibration(tiny, monkeypatch, budget, message: str) -> None:
    import fewbits.quant.pipeline as pipeline

    def calibrated(*args: object, **kwargs: object) -> None:
        raise AssertionError("calibrated before the budget was refused")

    monkeypatch.setattr(pipeline, "load_text", calibrated)
    with pytest.raises(BudgetError, match=message):
        fewbits.quantize(tiny("llama"), tiny("llama").parent / "never", recipe="auto",
                         overrides={f"budget.{k}": v for k, v in budget.items()})
    assert not (tiny("llama").parent / "never").exists()


def test_the_smallest_reachable_is_reached(tiny) -> None:
    with pytest.raises(BudgetError) as refused:
        _planner(tiny("llama"), budget__bpw=1.0)
    smallest = float(str(refused.value).partition("reachable is ")[2].partition(";")[0])
    plan = _with_made_up_losses(_planner(tiny("llama"))).plan(Budget(bpw=smallest))
    assert plan.bits_per_weight <= smallest < plan.bits_per_weight + 0.01


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral", "gpt2"])
def test_memory_is_what_a_real_run_allocates(tiny, family: str) -> None:
    """Weights as loaded and the KV cache of a real forward pass, to 2 %."""
    ctx, batch = 48, 2
    streamed = StreamedModel(open_source(tiny(family)), dtype=torch.float32, device=torch.device("cpu"))
    budget = Measure(Budget(fits_in=10**9, ctx=ctx, batch=batch), streamed)
    planner = _with_made_up_losses(_planner(tiny(family)))
    plan = planner.plan(Budget(fits_in=10**9, ctx=ctx, batch=batch))
    assert plan.footprint is not None
    out = tiny(family).parent / f"{family}-fits"
    fewbits.quantize(tiny(family), out, recipe=plan.recipe.model_copy(update={"budget": Budget()}), force=True)
    model = fewbits.load(out)
    with torch.no_grad():
        ran = model(torch.ones(batch, ctx, dtype=torch.int64), use_cache=True)
    cache = sum(
        t.numel() * t.element_size() for layer in ran.past_key_values.layers for t in (layer.keys, layer.values)
    )
    held = {t.data_ptr(): t.numel() * t.element_size() for _, t in [*model.named_parameters(), *model.named_buffers()]
            if t.is_contiguous()}
    weights = sum(v for v in held.values())
    assert plan.footprint.kv_cache == pytest.approx(cache, rel=0.02)
    assert plan.footprint.weights == pytest.approx(weights, rel=0.02)
    assert budget.limit(planner._base) == 10**9


def test_engines_limit_the_menu_and_tie_what_they_fuse(tiny) -> None:
    planner = _planner(tiny("llama"), allocate__target="vllm", allocate__formats=["int4_sym_g32", "int8_sym_g32"])
    layer = "model.layers.0"
    groups = [[f"{layer}.self_attn.{p}_proj" for p in "qkv"], [f"{layer}.mlp.{p}_proj" for p in ("gate", "up")]]
    units = build_units(planner.menu, planner.streamed, groups, planner.recipe)
    assert {u.names for u in units if len(u.names) > 1} == {tuple(g) for g in groups}
    with pytest.raises(RecipeError, match="vllm does not read int3_g32"):
        _planner(tiny("llama"), allocate__target="vllm", allocate__formats=["int3_g32"])


@pytest.mark.parametrize("damage", ["zd", "fisher"])
def test_ties_are_found_whatever_the_damage_model_looks_at(tiny, damage: str) -> None:
    from fewbits.quant.prepare import load_text

    menu = ["int4_sym_g32", "int8_sym_g32"]
    planner = _planner(tiny("llama"), allocate__target="vllm", allocate__formats=menu, allocate__damage=damage)
    text = load_text(planner.recipe, planner.streamed, 0, held_out=False)[0] if planner.needs_text else None
    planner.survey(text)
    for bpw in (5.2, 6.1, 7.3):
        formats = planner.plan(Budget(bpw=bpw)).recipe.plan
        for i in range(2):
            assert len({formats[f"model.layers.{i}.self_attn.{p}_proj"] for p in "qkv"}) == 1
            assert len({formats[f"model.layers.{i}.mlp.{p}_proj"] for p in ("gate", "up")}) == 1


def test_experts_of_a_layer_share_a_format(tiny) -> None:
    planner = _with_made_up_losses(_planner(tiny("qwen3-moe")))
    plan = planner.plan(Budget(bpw=4.2))
    formats: dict[str, set[str]] = {}
    for name, fmt in plan.recipe.plan.items():
        if ".experts." in name:
            formats.setdefault(name.rpartition(".")[0], set()).add(fmt)
    assert formats and all(len(f) == 1 for f in formats.values())


def test_rules_and_keep_limit_a_tensor(tiny) -> None:
    rules = [{"match": "*.down_proj", "format": "int8_g32"}]
    planner = _with_made_up_losses(_planner(tiny("llama"), rules=rules, keep=["*.o_proj"]))
    plan = planner.plan(Budget(bpw=9.0))
    assert {f for n, f in plan.recipe.plan.items() if n.endswith("down_proj")} == {"int8_g32"}
    assert not any(n.endswith("o_proj") for n in plan.recipe.plan)
    assert plan.bits_per_weight <= 9.0  # a kept tensor counts the bits it is stored in


def test_a_plan_file_is_carried_out(tiny, tmp_path: Path) -> None:
    import json

    plan = _with_made_up_losses(_planner(tiny("llama"))).plan(Budget(bpw=4.0))
    path = tmp_path / "plan.json"
    data = plan.to_json()
    first = next(t for t in data["tensors"] if t["name"].endswith("q_proj"))
    first["format"] = "int8_g32"  # a person may edit it
    path.write_text(json.dumps(data))
    fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="rtn", plan=path)
    written = {t["name"]: t["format"] for t in json.loads((tmp_path / "out" / "plan.json").read_text())["tensors"]}
    assert written[first["name"]] == "int8_g32"
    edited = {**plan.recipe.plan, first["name"]: "int8_g32"}
    assert {n: f for n, f in written.items() if n in edited} == edited
    again = tmp_path / "again"  # and the plan of a finished checkpoint is a plan too
    fewbits.quantize(tiny("llama"), again, recipe="rtn", plan=tmp_path / "out" / "plan.json")
    assert (again / "fewbits-00002-of-00003.safetensors").read_bytes() == (
        tmp_path / "out" / "fewbits-00002-of-00003.safetensors").read_bytes()
    first["name"] = "model.layers.0.self_attn.x_proj"
    path.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match="x_proj: the model has no such tensor; did you mean"):
        fewbits.quantize(tiny("llama"), tmp_path / "bad", recipe="rtn", plan=path)
    path.write_text("[]")
    with pytest.raises(RecipeError, match="is not a plan"):
        fewbits.quantize(tiny("llama"), tmp_path / "bad", recipe="rtn", plan=path)


def test_sizes_and_ranges_are_read() -> None:
    assert parse_size("90MB") == 90_000_000 and parse_size("1.5 GiB") == 3 << 29 and parse_size("77") == 77
    assert parse_range("2:3:0.5") == [2.0, 2.5, 3.0] and parse_range("2.5,4") == [2.5, 4.0]
    for bad in ("90 lightyears", "-3MB", "", "0"):
        with pytest.raises(BudgetError, match="needed a size"):
            parse_size(bad)
    for bad in ("3:2:1", "a:b:c", "2:3:0", "2,-1"):
        with pytest.raises(BudgetError, match="low:high:step"):
            parse_range(bad)


def test_one_budget_at_a_time_and_known_names() -> None:
    with pytest.raises(RecipeError, match="needed one of them"):
        load_recipe("auto", {"budget.bpw": 3, "budget.size": 10})
    with pytest.raises(RecipeError, match="unknown recipe key"):
        load_recipe("auto", {"budget.bpv": 3})
    assert isinstance(load_recipe("auto", {"budget.bpw": 3}), Recipe)


def test_unknown_menu_and_damage(tiny) -> None:
    with pytest.raises(FormatError, match="int9"):
        _planner(tiny("llama"), allocate__formats=["int9"])
    with pytest.raises(RecipeError, match="did you mean 'fisher'"):
        _planner(tiny("llama"), allocate__damage="fischer")


@pytest.mark.parametrize(
    "name, family",
    [*((n, "llama") for n in ("auto", "baq", "layerwise-lim", "layerwise-zd", "adaquant-ip", "evopress", "luq")),
     ("finequant", "llama"), ("finequant", "qwen3-moe"), ("auto", "qwen3-moe")],
)
def test_every_recipe_of_a_budget_runs_end_to_end(tiny, tmp_path: Path, name: str, family: str) -> None:
    """Met from below with the recipe's own damage model, unit and solver; the result loads."""
    menu = {"layerwise-lim": ["int2", "int4"], "layerwise-zd": ["int2", "int4"], "luq": ["int2", "int4"],
            "finequant": ["int3_row", "int3_g32", "int3_g16"]}.get(name, ["int2", "int3", "int4", "int8"])
    overrides = {"calibration.samples": 12, "calibration.seqlen": 32, "allocate.formats": menu,
                 "allocate.generations": 2, "allocate.offspring": 4, "budget.bpw": 4.0}
    made = fewbits.quantize(tiny(family), tmp_path / "out", recipe=name, overrides=overrides)
    formats = {f["format"] for f in _facts(tmp_path / "out") if f["linear"] and f["name"].count(".") > 3}
    assert len(formats) > 1, "a budget between two formats takes both"
    assert 3.2 < made.bits_per_weight <= 4.0
    assert made.measured is not None and made.measured["kl_mean"] > 0
    assert fewbits.load(tmp_path / "out")(torch.arange(3, 19)[None]).logits.isfinite().all()

"""Statistics gathered block by block against forward passes of the whole model, with hooks and a naive product."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fewbits.calibration import collect
from fewbits.calibration.block import Block
from fewbits.calibration.collect import Collector, make_batches
from fewbits.calibration.data import CalibrationSet
from fewbits.calibration.stored import StoredStats
from fewbits.calibration.stream import StreamedModel
from fewbits.quant.errors import CalibrationError, CheckpointError
from fewbits.quant.formats import parse_layout
from fewbits.quant.quantizers.gptq import GPTQ
from fewbits.quant.quantizers.rtn import RTN
from fewbits.quant.recipe import Recipe, parse_recipe
from fewbits.quant.source import open_source
from fewbits.quant.targets import Target, find_targets, read_weight
from fewbits.quant.types import LayerStats, QuantizedTensor
from tests.conftest import save_tiny_model

torch.set_num_threads(1)

FAMILIES = ["llama", "qwen3-moe", "gpt2", "phi", "opt"]
LENGTH = 24


def text(rows: int = 20, *, padded: bool = True, seed: int = 0) -> CalibrationSet:
    """Rows of random tokens; the last two are padded, one to 7 tokens and one to 1."""
    tokens = torch.randint(3, 256, (rows, LENGTH), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones(rows, LENGTH, dtype=torch.bool)
    if padded:
        mask[-2, 7:] = False
        mask[-1, 1:] = False
        tokens[~mask] = 250  # a padding token that would show in every sum
    return CalibrationSet(tokens, mask, "fingerprint", ["default"], [])


def recipe(**calibration: Any) -> Recipe:
    quantizer = {"name": "gptq", "qep": calibration.pop("qep", 0.0)}
    return parse_recipe({"quantizer": quantizer, "calibration": {"true_sequential": False} | calibration})


def streamed(path: Path) -> StreamedModel:
    return StreamedModel(open_source(path), dtype=torch.float32, device=torch.device("cpu"))


def whole(path: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    model.eval()
    return model


def in_blocks(model: StreamedModel) -> list[str]:
    return [n for n, t in model.targets.items() if t.kind != "embedding" and model.block_index(n) is not None]


# -- the oracle --------------------------------------------------------------------------------------------------------


def expert_inputs(module: nn.Module, x: Tensor, index: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """``(expert parameter and number, tokens, inputs)``: each expert by itself, from the definition of the layer."""
    for expert in range(module.gate_up_proj.shape[0]):
        tokens = (index == expert).any(dim=1).nonzero().flatten()
        gate, up = (x[tokens] @ module.gate_up_proj[expert].T).chunk(2, dim=1)
        yield f"gate_up_proj.{expert}", tokens, x[tokens]
        yield f"down_proj.{expert}", tokens, nn.functional.silu(gate) * up


def whole_inputs(model: nn.Module, rows: CalibrationSet, skip: int = 0) -> dict[str, Tensor]:
    """Target name -> its inputs ``(T, K)``, float64: each row by itself through the whole model, padding cut off."""
    found: dict[str, list[Tensor]] = {t.name: [] for t in find_targets(model)}
    width = {t.name: t.shape[1] for t in find_targets(model)}
    handles = []
    for name, module in model.named_modules():
        if name in found and not isinstance(module, nn.Embedding):
            def see(module: nn.Module, args: tuple, name: str = name) -> None:
                x = args[0].reshape(-1, args[0].shape[-1])
                found[name].append(x[skip:].double())
            handles.append(module.register_forward_pre_hook(see))
        elif hasattr(module, "gate_up_proj") and module.gate_up_proj is not None and name.endswith("experts"):
            def route(module: nn.Module, args: tuple, name: str = name) -> None:
                for local, tokens, x in expert_inputs(module, args[0], args[1]):
                    found[f"{name}.{local}"].append(x[tokens >= skip].double())
            handles.append(module.register_forward_pre_hook(route))
    with torch.no_grad():
        for tokens, mask in zip(rows.tokens, rows.mask):
            model(tokens[mask][None], use_cache=False)
    for handle in handles:
        handle.remove()
    return {n: torch.cat([torch.zeros(0, width[n], dtype=torch.float64), *x]) for n, x in found.items()}


def assert_same(stats: LayerStats, inputs: Tensor, name: str) -> None:
    assert stats.n_tokens == len(inputs), name
    expected = inputs.T @ inputs
    error = (stats.xtx.double() - expected).norm()
    assert error <= 1e-5 * expected.norm(), f"{name}: {error / expected.norm()}"


def walk(collector: Collector, model: StreamedModel) -> Iterator[tuple[Block, list[list[str]], dict[str, LayerStats]]]:
    """The loop of the pipeline, without quantizing: yields every step with its statistics."""
    for block in model.blocks():
        for step in collector.steps(block):
            yield block, step, collector.observe(block, step)
        collector.advance(block)


def gathered(collector: Collector, model: StreamedModel) -> dict[str, LayerStats]:
    """Target name -> the statistics of the group that it is in."""
    out = {}
    for _, step, stats in walk(collector, model):
        for group in step:
            out |= dict.fromkeys(group, stats[group[0]])
    return out


# -- batches -----------------------------------------------------------------------------------------------------------


def test_batches_never_hold_padding() -> None:
    rows = text(6)
    batches = make_batches(rows.tokens, rows.mask)
    assert [tuple(b.shape) for b in batches] == [(4, LENGTH), (1, 7), (1, 1)]
    assert torch.equal(batches[0], rows.tokens[:4]) and torch.equal(batches[1][0], rows.tokens[4, :7])
    assert sum(b.numel() for b in batches) == rows.n_tokens


def test_batches_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = text(7, padded=False)
    monkeypatch.setattr(collect, "BATCH_TOKENS", 2 * LENGTH + 1)
    assert [len(b) for b in make_batches(rows.tokens, rows.mask)] == [2, 2, 2, 1]
    monkeypatch.setattr(collect, "BATCH_TOKENS", 1)
    batches = make_batches(rows.tokens, rows.mask)
    assert [len(b) for b in batches] == [1] * 7 and torch.equal(torch.cat(batches), rows.tokens)


def test_rows_without_a_token_are_left_out() -> None:
    rows = text(3)
    rows.mask[2] = False
    assert [tuple(b.shape) for b in make_batches(rows.tokens, rows.mask)] == [(1, LENGTH), (1, 7)]
    only = make_batches(rows.tokens[1:2], rows.mask[1:2])
    assert [tuple(b.shape) for b in only] == [(1, 7)]


# -- statistics of the original model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_the_whole_model(family: str, skip: int, tiny) -> None:
    rows = text(40 if family == "qwen3-moe" else 12)
    expected = whole_inputs(whole(tiny(family)), rows, skip)
    model = streamed(tiny(family))
    wanted = in_blocks(model)
    collector = Collector(model, recipe(skip_tokens=skip), wanted, rows)
    stats = gathered(collector, model)
    assert set(stats) == set(wanted)
    for name in wanted:
        assert_same(stats[name], expected[name], name)
    if family != "qwen3-moe":
        assert {s.n_tokens for s in stats.values()} == {rows.n_tokens - (10 * skip + 2 + 1 if skip else 0)}
    assert_same(collector.observe_head(), expected["lm_head"], "lm_head")


def test_experts_that_see_every_token_in_an_order_of_their_own(tmp_path: Path) -> None:
    """Two experts, both for every token: the gather lists first the tokens that rank the expert first."""
    path = save_tiny_model(tmp_path, "qwen3-moe", num_experts=2, num_experts_per_tok=2)
    rows = text(8)
    expected = whole_inputs(whole(path), rows, skip=3)
    model = streamed(path)
    stats = gathered(Collector(model, recipe(skip_tokens=3), in_blocks(model), rows), model)
    for name in in_blocks(model):
        assert_same(stats[name], expected[name], name)


def test_the_size_of_batches_changes_only_rounding(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    for family in ("llama", "qwen3-moe"):
        rows, sums = text(40), []
        for tokens in (4096, 3 * LENGTH, 1):
            monkeypatch.setattr(collect, "BATCH_TOKENS", tokens)
            model = streamed(tiny(family))
            sums.append(gathered(Collector(model, recipe(skip_tokens=1), in_blocks(model), rows), model))
        for name, stats in sums[0].items():
            for other in sums[1:]:
                assert other[name].n_tokens == stats.n_tokens
                assert (other[name].xtx - stats.xtx).norm() <= 1e-5 * stats.xtx.norm()


@pytest.mark.parametrize("settings", [{}, {"qep": 0.5}, {"true_sequential": True}, {"inputs": "original"}])
def test_hidden_states_on_disk_change_nothing(settings: dict[str, Any], tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    for limit in (collect.HIDDEN_LIMIT_BYTES, 0):
        monkeypatch.setattr(collect, "HIDDEN_LIMIT_BYTES", limit)
        model = streamed(tiny("llama"))
        collector = Collector(model, recipe(**settings), in_blocks(model), text(6))
        assert collector._hidden.spilled == (limit == 0)
        runs.append(gathered(collector, model))
    for name, stats in runs[0].items():
        other = runs[1][name]
        assert torch.equal(stats.xtx, other.xtx) and stats.n_tokens == other.n_tokens
        assert (stats.cross is None) == (other.cross is None)
        assert stats.cross is None or torch.equal(stats.cross, other.cross)


def test_only_what_is_wanted_is_gathered(tiny) -> None:
    model = streamed(tiny("llama"))
    wanted = ["model.layers.0.self_attn.k_proj", "model.layers.1.mlp.down_proj"]
    seen = [[group for group in step] for _, step, _ in walk(Collector(model, recipe(), wanted, text(4)), model)]
    assert seen == [
        [[f"model.layers.0.self_attn.{n}_proj" for n in "qkv"]], [["model.layers.1.mlp.down_proj"]],
    ]


def test_without_text_nothing_runs(tiny) -> None:
    model = streamed(tiny("llama"))
    collector = Collector(model, recipe(), in_blocks(model), None)
    for block, step, stats in walk(collector, model):
        assert stats == {} and sorted(n for g in step for n in g) == sorted(t.name for t in block.targets)
        assert all(len(g) == 1 for g in step)
    assert collector.observe_head() is None


def test_settings_that_contradict_each_other(tiny) -> None:
    model = streamed(tiny("llama"))
    for more in ({"true_sequential": True}, {"qep": 0.5}):
        with pytest.raises(CalibrationError, match="'original' goes with neither true_sequential nor qep"):
            Collector(model, recipe(inputs="original", **more), in_blocks(model), text(2))


# -- statistics of the partly quantized model --------------------------------------------------------------------------


def coarse(block: Block, names: list[str]) -> dict[str, QuantizedTensor]:
    """Two bits, so that nobody can miss it."""
    out = {}
    for name in names:
        weight = block.weights[name].float()
        out[name] = RTN().quantize(weight, None, parse_layout("int2_g32", weight.shape[1]))[0]
    return out


def replace(model: nn.Module, made: dict[str, QuantizedTensor]) -> None:
    """Put quantized weights into a whole model."""
    targets = {t.name: t for t in find_targets(model)}
    with torch.no_grad():
        for name, tensor in made.items():
            read_weight(model, targets[name]).copy_(tensor.dequantize())


@pytest.mark.parametrize("inputs", ["quantized", "original"])
@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2"])
def test_statistics_see_the_quantized_blocks_before(family: str, inputs: str, tiny) -> None:
    rows = text(40 if family == "qwen3-moe" else 8)
    model, reference = streamed(tiny(family)), whole(tiny(family))
    collector = Collector(model, recipe(inputs=inputs), in_blocks(model), rows)
    original = whole_inputs(reference, rows)
    for block, step, stats in walk(collector, model):
        expected = original if inputs == "original" else whole_inputs(reference, rows)
        for group in step:
            for name in group:
                assert_same(stats[group[0]], expected[name], name)
        made = coarse(block, [n for g in step for n in g])
        collector.install(block, made)
        replace(reference, made)
    expected = original if inputs == "original" else whole_inputs(reference, rows)
    assert_same(collector.observe_head(), expected["lm_head"], "lm_head")
    changed = whole_inputs(reference, rows)["lm_head"]
    assert (changed - original["lm_head"]).norm() > 0.01 * changed.norm()  # or the test above tests nothing


@pytest.mark.parametrize(("family", "limit"), [
    ("llama", 0), *((f, collect.PAUSED_LIMIT_BYTES) for f in ("llama", "phi", "gpt2", "qwen3-moe")),
])
def test_true_sequential_steps_see_the_ones_before(
    family: str, limit: int, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "PAUSED_LIMIT_BYTES", limit)  # passes kept open, or a pass for every step
    rows = text(40 if family == "qwen3-moe" else 6)
    model, reference = streamed(tiny(family)), whole(tiny(family))
    collector = Collector(model, recipe(true_sequential=True), in_blocks(model), rows)
    steps = []
    for block, step, stats in walk(collector, model):
        expected = whole_inputs(reference, rows)
        for group in step:
            for name in group:
                assert_same(stats[group[0]], expected[name], name)
        names = [n for g in step for n in g]
        if block.index == 0:
            steps.append([n.removeprefix(block.name + ".") for n in names])
        made = coarse(block, names)
        collector.install(block, made)
        replace(reference, made)
    expected_steps = {
        "llama": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
                  ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]],
        "phi": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"], ["self_attn.dense"],
                ["mlp.fc2"]],
        "gpt2": [["attn.c_attn"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
        "qwen3-moe": [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
                      [f"mlp.experts.gate_up_proj.{e}" for e in range(4)],
                      [f"mlp.experts.down_proj.{e}" for e in range(4)]],
    }
    assert [sorted(s) for s in steps] == [sorted(s) for s in expected_steps[family]]


def test_numbered_linears_are_steps_of_their_own(tiny) -> None:
    """``mlp.0`` and ``mlp.2`` of an nn.Sequential are no experts: the second must see the first quantized."""
    model = streamed(tiny("llama"))
    collector = Collector(model, recipe(true_sequential=True), [], None)
    names = ["b.0.mlp.0", "b.0.mlp.2"]
    collector.wanted = set(names)
    targets = [Target(n, n, "linear", "weight", None, (4, 4)) for n in names]
    block = Block("b.0", 0, nn.Identity(), targets, {}, {}, nn.Identity())
    assert collector.steps(block) == [[["b.0.mlp.0"]], [["b.0.mlp.2"]]]


@pytest.mark.parametrize(("family", "settings", "limit"), [
    ("llama", {"skip_tokens": 2}, 0), ("llama", {"true_sequential": True}, 0),
    ("llama", {"true_sequential": True, "skip_tokens": 2}, collect.PAUSED_LIMIT_BYTES),
    ("gpt2", {"true_sequential": True}, collect.PAUSED_LIMIT_BYTES),
    ("qwen3-moe", {}, 0), ("qwen3-moe", {"true_sequential": True, "skip_tokens": 2}, 0),
])
def test_qep_sums_the_difference_to_the_original_model(
    family: str, settings: dict[str, Any], limit: int, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collect, "PAUSED_LIMIT_BYTES", limit)
    rows, skip = text(30 if family == "qwen3-moe" else 6), settings.get("skip_tokens", 0)
    model, reference = streamed(tiny(family)), whole(tiny(family))
    original = whole_inputs(reference, rows, skip)
    collector = Collector(model, recipe(qep=1.0, **settings), in_blocks(model), rows)
    compared = 0
    for block, step, stats in walk(collector, model):
        own = whole_inputs(reference, rows, skip)
        for group in step:
            got = stats[group[0]]
            assert_same(got, own[group[0]], group[0])
            if ".experts." in group[0]:  # routed otherwise in the two models: there is nothing to pair
                assert got.cross is None
                continue
            x = own[group[0]]
            expected = (original[group[0]] - x).T @ x
            assert got.cross is not None
            assert (got.cross.double() - expected).norm() <= 1e-5 * (x.T @ x).norm(), group[0]
            compared += bool(expected.norm() > 1e-3 * (x.T @ x).norm())
        made = coarse(block, [n for g in step for n in g])
        collector.install(block, made)
        replace(reference, made)
    assert compared >= (2 if family == "qwen3-moe" else 4)


@pytest.mark.parametrize("true_sequential", [False, True])
def test_a_block_that_is_not_observed_moves_both_models_on(true_sequential: bool, tiny) -> None:
    """As when a run resumes: its first block comes quantized from its shard, and the second one's statistics count."""
    rows, model, reference = text(6), streamed(tiny("llama")), whole(tiny("llama"))
    original = whole_inputs(reference, rows)
    collector = Collector(model, recipe(qep=1.0, true_sequential=true_sequential), in_blocks(model), rows)
    for block in model.blocks():
        if block.index == 0:
            made = coarse(block, list(block.weights))
            collector.install(block, made)
            replace(reference, made)
        else:
            own, name = whole_inputs(reference, rows), f"{block.name}.self_attn.q_proj"
            stats = collector.observe(block, collector.steps(block)[0])[name]
            assert_same(stats, own[name], name)
            expected = (original[name] - own[name]).T @ own[name]
            assert stats.cross is not None and (stats.cross.double() - expected).norm() <= 1e-5 * expected.norm()
            collector.close()
            break
        collector.advance(block)


def test_abandoned_passes_leave_no_thread(tiny) -> None:
    import threading

    before = threading.active_count()
    model = streamed(tiny("llama"))
    collector = Collector(model, recipe(true_sequential=True), in_blocks(model), text(4))
    next(walk(collector, model))
    collector.close()
    assert threading.active_count() == before


# -- experts -----------------------------------------------------------------------------------------------------------


def test_starved_experts_get_the_sums_of_the_layer(tiny) -> None:
    rows = text(5, padded=False)
    expected = whole_inputs(whole(tiny("qwen3-moe")), rows)
    model = streamed(tiny("qwen3-moe"))
    collector = Collector(model, recipe(), in_blocks(model), rows)
    stats = gathered(collector, model)
    starved = plenty = 0
    for name in in_blocks(model):
        inputs = expected[name]
        if ".experts." in name and len(inputs) < inputs.shape[1]:
            layer = re.sub(r"\d+$", "", name)
            inputs = torch.cat([x for n, x in expected.items() if n.startswith(layer)])
            starved += 1
        else:
            plenty += ".experts." in name
        assert_same(stats[name], inputs, name)
    assert starved and plenty  # or the text is too long or too short for this test
    assert any("experts" in w for w in collector.warnings)


def test_experts_that_see_nothing_get_the_sums_of_the_layer(tiny) -> None:
    rows = CalibrationSet(torch.tensor([[5, 9]]), torch.ones(1, 2, dtype=torch.bool), "", [], [])
    model = streamed(tiny("qwen3-moe"))
    stats = gathered(Collector(model, recipe(), in_blocks(model), rows), model)
    experts = [s for n, s in stats.items() if ".gate_up_proj." in n]
    assert len(experts) == 8 and {s.n_tokens for s in experts} == {4}  # two tokens, two experts each


# -- kept statistics ---------------------------------------------------------------------------------------------------


def keep(folder: Path, path: Path, wanted: list[str] | None = None, **settings: Any) -> dict[str, LayerStats]:
    """Statistics of the original model by way of a directory; gathered there if it is new."""
    model = streamed(path)
    stored = StoredStats(folder, {"model": "tiny", "skip_tokens": settings.get("skip_tokens", 0)})
    made = recipe(inputs="original", **settings)
    collector = Collector(model, made, in_blocks(model) if wanted is None else wanted, text(10), stored)
    assert collector.runs == (not stored.complete)
    out = gathered(collector, model) | {"lm_head": collector.observe_head()}
    stored.finish()
    return out


@pytest.mark.parametrize("family", ["llama", "qwen3-moe"])
def test_kept_statistics_are_those_of_a_fresh_run(family: str, tiny, tmp_path: Path) -> None:
    model = streamed(tiny(family))
    collector = Collector(model, recipe(inputs="original"), in_blocks(model), text(10))
    fresh = gathered(collector, model) | {"lm_head": collector.observe_head()}
    first = keep(tmp_path / "stats", tiny(family))
    again = keep(tmp_path / "stats", tiny(family))
    assert fresh.keys() == first.keys() == again.keys()
    for name, stats in fresh.items():
        for other in (first[name], again[name]):
            assert other.n_tokens == stats.n_tokens and torch.equal(other.xtx, stats.xtx)
    for block in model.blocks():
        for name, weight in block.weights.items():
            layout = parse_layout("int3_g32", weight.shape[1])
            a, b = (GPTQ().quantize(weight, s[name], layout)[0] for s in (fresh, again))
            assert torch.equal(a.segments[0].codes, b.segments[0].codes)


def test_kept_statistics_serve_a_recipe_that_wants_less(tiny, tmp_path: Path) -> None:
    everything = keep(tmp_path / "stats", tiny("llama"))
    some = ["model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"]
    less = keep(tmp_path / "stats", tiny("llama"), some)
    assert set(less) == {"lm_head", *some, "model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj"}
    assert all(torch.equal(everything[n].xtx, s.xtx) for n, s in less.items())


def test_kept_statistics_of_some_blocks_only(tiny, tmp_path: Path) -> None:
    wanted = [f"model.layers.1.self_attn.{n}_proj" for n in "qkv"]
    first = keep(tmp_path / "stats", tiny("llama"), wanted)
    assert set(keep(tmp_path / "stats", tiny("llama"), wanted)) == set(first) == {"lm_head", *wanted}


@pytest.mark.parametrize("missing", ["model.layers.0.mlp.down_proj", "model.layers.1."])
def test_kept_statistics_that_lack_a_tensor_are_an_error(missing: str, tiny, tmp_path: Path) -> None:
    """Else the tensor would be neither quantized nor stored."""
    every = in_blocks(streamed(tiny("llama")))
    keep(tmp_path / "stats", tiny("llama"), [n for n in every if not n.startswith(missing)])
    with pytest.raises(CheckpointError, match=rf"has no statistics of {re.escape(missing)}.*another directory"):
        keep(tmp_path / "stats", tiny("llama"))


def test_kept_statistics_of_something_else_are_refused(tiny, tmp_path: Path) -> None:
    keep(tmp_path / "stats", tiny("llama"), skip_tokens=1)
    with pytest.raises(CheckpointError, match=r"holds statistics of another run \(skip_tokens differs\)"):
        keep(tmp_path / "stats", tiny("llama"))


def test_unfinished_statistics_are_gathered_anew(tiny, tmp_path: Path) -> None:
    expected = keep(tmp_path / "whole", tiny("llama"))
    model = streamed(tiny("llama"))
    stored = StoredStats(tmp_path / "stats", {"model": "tiny", "skip_tokens": 0})
    next(walk(Collector(model, recipe(inputs="original"), in_blocks(model), text(3), stored), model))  # and killed
    assert not StoredStats(tmp_path / "stats", {}).complete
    got = keep(tmp_path / "stats", tiny("llama"))
    assert all(torch.equal(got[n].xtx, s.xtx) for n, s in expected.items())
    assert not list((tmp_path / "stats").glob("*.tmp"))

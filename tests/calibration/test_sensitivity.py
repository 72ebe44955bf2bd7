"""Damage models: their oracles, their claims on a real forward pass, and the contract that all of them keep."""

from __future__ import annotations

import math

import pytest
import torch

from fewbits.calibration.blockscores import cluster_entropy
from fewbits.calibration.curvature import output_curvature
from fewbits.calibration.feedback import SAMPLED_ROWS, feedback_damage
from fewbits.calibration.meter import KLMeter
from fewbits.calibration.sensitivity import DAMAGE, WEIGHTS_ONLY, measure
from fewbits.calibration.stream import StreamedModel
from fewbits.calibration.survey import Survey
from fewbits.quant.allocate.menu import build_menu
from fewbits.quant.formats import parse_layout
from fewbits.quant.prepare import load_text
from fewbits.quant.quantizers.gptq import GPTQ
from fewbits.quant.recipe import load_recipe
from fewbits.quant.source import open_source
from fewbits.quant.targets import find_targets, read_weight
from fewbits.quant.types import LayerStats, proxy_loss


def _survey(path, **overrides: object) -> Survey:
    settings = {"calibration.samples": 6, "calibration.seqlen": 48, "calibration.dtype": "float32"}
    recipe = load_recipe("auto", {**settings, **{k.replace("__", "."): v for k, v in overrides.items()}})
    streamed = StreamedModel(open_source(path), dtype=torch.float32, device=torch.device("cpu"))
    text, _ = load_text(recipe, streamed, 0, held_out=False)
    return Survey(streamed, recipe, build_menu(recipe, streamed), text, None, 0, lambda *a: None)


@pytest.mark.parametrize("damage", sorted(DAMAGE))
@pytest.mark.parametrize("family", ["llama", "qwen3-moe", "gpt2"])
def test_every_model_judges_every_entry_and_more_bits_hurt_less(tiny, family: str, damage: str) -> None:
    job = _survey(tiny(family), allocate__formats=["int2", "int4", "int8"])
    losses = measure(job, damage)
    assert losses.keys() == job.menu.keys()
    for name, own in losses.items():
        assert own.keys() == job.menu[name].keys()
        assert all(math.isfinite(v) and v >= 0 for v in own.values()), name
    total = {e: sum(own[e] for own in losses.values()) for e in ("int2", "int4", "int8")}
    assert total["int2"] > total["int4"] > total["int8"]


def test_experts_are_judged_like_all_else(tiny) -> None:
    """Fused experts show their linears one at a time: else their gradients go unseen, and they seem to cost nothing."""
    from scipy.stats import spearmanr

    job = _survey(tiny("qwen3-moe"), allocate__formats=["int2", "int8"])
    fisher, kl = measure(job, "fisher"), measure(job, "kl")
    experts = [n for n in job.menu if job.streamed.targets[n].kind == "expert"]
    assert experts and sum(fisher[n]["int2"] > 0 for n in experts) > 0.8 * len(experts)
    names = list(job.menu)
    assert spearmanr([fisher[n]["int2"] for n in names], [kl[n]["int2"] for n in names]).statistic > 0.7


def test_weights_only_models_need_no_text(tiny) -> None:
    job = _survey(tiny("llama"))
    job.text = None
    for damage in WEIGHTS_ONLY:
        assert measure(job, damage).keys() == job.menu.keys()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_feedback_damage_is_what_gptq_loses(bits: int) -> None:
    """Within a quarter; at 2 bits a third too little, because compensated weights leave a grid that narrow."""
    torch.manual_seed(0)
    mix = torch.randn(128, 128) / 11 + 0.3 * torch.eye(128)
    x = torch.randn(4000, 128) * torch.logspace(0, -1.5, 128) @ mix
    weight = torch.randn(SAMPLED_ROWS * 2, 128)
    stats = LayerStats(x.T @ x, len(x))
    layout = parse_layout(f"int{bits}_g64", 128)
    (foreseen,) = feedback_damage(weight, stats, [layout], None)
    made, _ = GPTQ().quantize(weight, stats, layout)
    lost = proxy_loss(weight, made, stats)[0] / 2
    assert foreseen == pytest.approx(lost, rel=0.25 if bits > 2 else 0.4)


def test_curvature_foresees_measured_kl(tiny) -> None:
    """Small random errors in one weight at a time: half the curvature-weighted output error is their KL."""
    from fewbits import load

    model = load(tiny("llama"))
    targets = [t for t in find_targets(model) if t.kind == "linear" and ".layers." in t.name]
    draw = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 256, (64,), generator=draw) for _ in range(24)]
    curvature = output_curvature(model, targets, rows)
    meter = KLMeter(model, rows)
    inputs: dict[str, torch.Tensor] = {}
    hooks = [
        model.get_submodule(t.name).register_forward_pre_hook(
            lambda m, a, n=t.name: inputs.__setitem__(n, inputs.get(n, 0) + a[0][0].T @ a[0][0])
        )
        for t in targets
    ]
    with torch.no_grad():
        for row in rows:
            model(row[None])
    for h in hooks:
        h.remove()
    foreseen, found = [], []
    for t in targets:
        weight = read_weight(model, t).clone()
        error = 0.02 * weight.std() * torch.randn(weight.shape, generator=draw)
        h = inputs[t.name] / (24 * 64)
        foreseen.append(0.5 * float(curvature[t.name] @ ((error @ h) * error).sum(1)))
        found.append(meter.measure({t.name: weight + error}))
        assert torch.equal(read_weight(model, t), weight)  # the meter puts things back
    ratio = torch.tensor(found) / torch.tensor(foreseen)
    assert 0.5 < float(ratio.median()) < 2 and float(ratio.log().std()) < 0.7


def test_the_meter_measures_zero_for_no_change(tiny) -> None:
    from fewbits import load

    model = load(tiny("llama"))
    rows = [torch.arange(3, 40)]
    name = "model.layers.0.mlp.down_proj"
    assert KLMeter(model, rows).measure({name: model.get_submodule(name).weight.detach().clone()}) == pytest.approx(
        0, abs=1e-4)


def test_a_block_that_does_nothing_matters_least(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    from tests.conftest import save_tiny_model

    path = save_tiny_model(tmp_path, "llama", num_hidden_layers=3)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()
    model.save_pretrained(path)
    losses = measure(_survey(path, allocate__formats=["int2", "int4"]), "lim")
    damage = [losses[f"model.layers.{i}.mlp.up_proj"]["int2"] for i in range(3)]
    assert min(damage) == damage[1]


def test_entropy_of_clusters() -> None:
    draw = torch.Generator().manual_seed(0)
    assert cluster_entropy(torch.ones(500, 8))[0] == 0  # constant outputs
    centers = 100 * torch.randn(8, 16, generator=draw)
    even = centers.repeat(200, 1) + 0.01 * torch.randn(1600, 16, generator=draw)
    assert 2.0 < cluster_entropy(even, clusters=8)[0] <= 3.0 + 1e-9  # at most log2 of the clusters
    spread = cluster_entropy(torch.randn(5000, 16, generator=draw))[0]
    assert 6 < spread <= math.log2(100)

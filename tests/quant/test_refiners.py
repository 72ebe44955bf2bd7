"""Refiners: gradients reach what is stored, losses fall, formats stay, and an interrupted run gives the same bytes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.kernels.cpu import divergence
from fewbits.quant import checkpoint
from fewbits.quant.checkpoint import StateFile
from fewbits.quant.errors import RecipeError
from fewbits.quant.formats import parse_layout
from fewbits.quant.inspection import inspect
from fewbits.quant.quantizers import RTN
from fewbits.quant.recipe import load_recipe
from fewbits.quant.refiners import REFINERS
from fewbits.quant.refiners.losses import Loss, pull
from fewbits.quant.refiners.signround import SignRound
from fewbits.quant.refiners.tunable import Tunable, recodable
from fewbits.quant.types import LayerStats, QuantizedTensor
from tests.conftest import save_tiny_model

torch.set_num_threads(1)

LAYOUTS = ["int2_g32", "int4_sym_row", "ternary_g32", "ternary_mean_g32_b3", "binary2_row", "fdb_g32", "nf4_g32",
           "bitmod3_g32", "nupes3_g32", "mxfp4", "vq8_v4", "pq8_v2", "lrvq8_v4_d2", "had:int2_g32", "scl:binary_row",
           "lr4:int2_g32", "trellis2", "rvq2", "fairy2", "perm:int2_g32"]


def made(layout: str, rows: int = 320, columns: int = 64) -> tuple[torch.Tensor, LayerStats, QuantizedTensor]:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns) * torch.rand(rows, 1)
    x = torch.randn(512, columns) * (0.2 + torch.rand(columns))
    stats = LayerStats(x.T @ x, len(x))
    return weight, stats, RTN("search").quantize(weight, stats, parse_layout(layout, columns))[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tunable_starts_as_it_is_stored(layout):
    weight, _, tensor = made(layout)
    for codes in (None, weight):
        tunable = Tunable(tensor, codes)
        torch.testing.assert_close(tunable.dense(), tensor.dequantize(), rtol=1e-5, atol=1e-6)
        frozen = tunable.frozen()
        assert frozen.layout == tensor.layout
        assert all(torch.equal(a, b) for a, b in zip(frozen.pack().values(), tensor.pack().values()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_dense_weight(layout):
    """Along every free parameter the loss changes as finite differences of what would be stored say."""
    _, _, tensor = made(layout)
    tunable = Tunable(tensor)
    gradient = torch.randn(tensor.shape)
    for free in tunable.free:
        free.change.requires_grad_()
    if not tunable.free:
        assert (tensor.rotation is None and not recodable(tensor.segments[0])) or layout == "mxfp4"
        return
    tunable.dense().backward(gradient)
    for free in tunable.free:
        along, step = torch.randn_like(free.change), 1e-2
        slope = float((free.change.grad * along).sum())
        ends = []
        for sign in (-1, 1):
            free.change = (sign * step * along).detach()
            ends.append(float((tunable.dense() * gradient).double().sum()))
        free.change = torch.zeros_like(along)
        assert (ends[1] - ends[0]) / (2 * step) == pytest.approx(slope, rel=2e-2, abs=2e-2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codes", [False, True])
def test_steps_lower_a_quadratic_loss(layout, codes):
    """The layer's own output error: a loss of which the gradient is known, ``2 (Q - W) H``."""
    weight, stats, tensor = made(layout)
    if codes and not recodable(tensor.segments[0]):
        pytest.skip("its codes are searched for too slowly to move")
    tunable = Tunable(tensor, weight if codes else None)

    def loss(q: torch.Tensor) -> float:
        return float((((q - weight) @ stats.hessian) * (q - weight)).sum())

    best = before = loss(tensor.dequantize())
    for i in range(60):
        gradient = 2 * (tunable.dense().detach() - weight) @ stats.hessian
        slower = 1 - i / 60
        tunable.step(gradient, rate=0.01 * slower, code_rate=0.05 * slower if codes else 0, most=0.01)
        best = min(best, loss(tunable.frozen().dequantize()))
    if layout == "scl:binary_row" or (layout == "mxfp4" and codes):
        assert best <= before  # fitted exactly already; levels too coarse for so small steps
    elif tunable.free or codes:
        assert best < before
    else:
        assert best == before
    assert tunable.frozen().layout == tensor.layout


def test_a_step_changes_no_more_codes_than_it_may():
    weight, _, tensor = made("int2_g32")
    tunable = Tunable(tensor, weight)
    before = tunable.tensor.segments[0].codes.clone()
    tunable.step(torch.randn(320, 64), rate=0.0, code_rate=0.5, most=0.01)
    changed = int((tunable.tensor.segments[0].codes != before).sum())
    assert 0 < changed <= 0.01 * before.numel()
    assert torch.equal(tunable.frozen().segments[0].params["scale"], tensor.segments[0].params["scale"])


def test_state_restores():
    weight, _, tensor = made("int2_g32")
    one, other = Tunable(tensor, weight), Tunable(tensor, weight)
    gradients = [torch.randn(320, 64) for _ in range(4)]
    for g in gradients[:2]:
        one.step(g, rate=0.01, code_rate=0.1)
    other.restore({k: v.clone() for k, v in one.state().items()})
    for g in gradients[2:]:
        for each in (one, other):
            each.step(g, rate=0.01, code_rate=0.1)
    for a, b in zip(one.frozen().pack().values(), other.frozen().pack().values()):
        assert torch.equal(a, b)


# -- losses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (5, 1003), (40, 257)])
def test_the_compiled_divergence_is_that_of_torch(shape, dtype, monkeypatch):
    """Also far from each other, where probabilities vanish, and at the same place, where the loss is 0."""
    if not divergence.takes(torch.zeros(1, 1)):
        pytest.skip("no C compiler")
    torch.manual_seed(0)
    for scale in (0.0, 1.0, 30.0, 300.0):
        student = (scale * torch.randn(shape)).to(dtype).requires_grad_()
        teacher = (scale * torch.randn(shape)).to(dtype)
        found = []
        for takes in (divergence.takes, lambda logits: False):
            monkeypatch.setattr(divergence, "takes", takes)
            kl = Loss()(student, teacher)
            (gradient,) = torch.autograd.grad(kl.sum(), student)
            found.append((kl.detach(), gradient.float()))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-6)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kind", ["kl", "dad", "topk"])
def test_losses_and_their_gradients(kind, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(divergence, "takes", lambda logits: False)
    torch.manual_seed(0)
    head = torch.randn(50, 16)
    student, teacher = torch.randn(700, 16, requires_grad=True), torch.randn(700, 16)
    loss = Loss(kind, gamma=0.5, k=5)
    total = pull(loss, lambda h: h @ head.T, student, teacher, 1 / 700)
    gradient = student.grad.clone()
    student.grad = None
    s, t = student @ head.T, teacher @ head.T
    if kind == "topk":
        top = t.topk(5).indices
        s, t = s.gather(1, top), t.gather(1, top)
    kl = (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1)
    if kind == "dad":
        entropy = -(t.softmax(1) * t.log_softmax(1)).sum(1)
        kl = kl * (entropy / math.log(50)).sqrt()
    kl.mean().backward()
    assert total == pytest.approx(float(kl.sum()), rel=1e-4)
    torch.testing.assert_close(gradient, student.grad, rtol=1e-3, atol=1e-6)


def test_no_loss_where_student_is_the_teacher():
    states = torch.randn(10, 8, requires_grad=True)
    assert pull(Loss(), lambda h: h, states, states.detach(), 1.0) == pytest.approx(0, abs=1e-5)
    assert float(states.grad.abs().max()) < 1e-6


# -- whole models ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(topics[k] for k in sorted(topics))[:20_000], encoding="utf-8")
    return path


def small(text: Path, **more: object) -> dict[str, object]:
    return {"format.bits": 2, "format.group_size": 32, "calibration.samples": 8, "calibration.seqlen": 32,
            "calibration.sources": [str(text)], "calibration.dtype": "float32"} | more


def refine(name: str, **options: object) -> dict[str, object]:
    if REFINERS[name].stage == "block":
        every = {"iterations": 12, "held_out": 4, "batch": 4, "rate": 0.01, "checks": 6}
    else:
        every = {"samples": 24, "held_out": 4, "epochs": 2.0, "batch": 4, "checks": 4}
        every |= {"code_rate": 0.02} if name == "qat" else {}
    return {f"refine.{name}.{key}": value for key, value in (every | options).items()}


@pytest.mark.parametrize("family", ["llama-tied", "qwen3-moe", "gemma", "gpt2", "opt"])
@pytest.mark.parametrize("name", list(REFINERS))
def test_every_refiner_lowers_the_loss_of_every_architecture(name, family, tiny, text, tmp_path):
    recipe = "rtn" if name == "qat" else "gptq"  # few steps of training do not make up for what it does not start from
    made = fewbits.quantize(tiny(family), tmp_path / "out", recipe=recipe,
                            overrides=small(text, **refine(name, rate=0.01)))
    (report,) = made.to_json()["refined"]
    assert report["refiner"] == name and report["after"] < report["before"] and report["helped"]
    if REFINERS[name].stage == "model":
        assert len(report["curve"]) == 12 and sum(seen is not None for *_, seen in report["curve"]) == 4
    else:
        assert [i for i, *_ in report["curve"]] == [0, 1]
    stored = inspect(tmp_path / "out")
    plain = fewbits.quantize(tiny(family), tmp_path / "plain", recipe=recipe, overrides=small(text))
    assert made.bytes == plain.bytes, "a refiner changes no format"
    scores = [fewbits.evaluate(tmp_path / out, baseline=tiny(family), text=text, window=32, limit=16).total.divergence
              for out in ("out", "plain")]
    # the outputs of blocks stand in for the loss that matters
    assert scores[0].kl_mean < scores[1].kl_mean * (1.1 if REFINERS[name].stage == "block" else 1.0)
    assert {t["format"] for t in stored.to_json()["tensors"]} == {
        t["format"] for t in inspect(tmp_path / "plain").to_json()["tensors"]}


def test_what_does_not_help_leaves_everything_as_it_was(tiny, text, tmp_path):
    """At a learning rate of 1 whatever moves is lost."""
    made = fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="gptq",
                            overrides=small(text, **refine("distill", rate=1.0)))
    (report,) = made.refined
    assert not report["helped"] and report["after"] == report["before"]
    assert any("did not fall" in w for w in made.warnings)
    fewbits.quantize(tiny("llama"), tmp_path / "plain", recipe="gptq", overrides=small(text))
    for path in (tmp_path / "plain").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_refiners_of_blocks_see_the_original_weights(dtype, tiny, text, tmp_path, monkeypatch):
    """And not what the quantizer put in their place, be there a cast between the two or not."""
    seen = []
    tunable = SignRound.tunable

    def watched(self: SignRound, tensor: QuantizedTensor, weight: torch.Tensor, seed: int) -> Tunable:
        seen.append(weight.float().clone())
        return tunable(self, tensor, weight, seed)

    monkeypatch.setattr(SignRound, "tunable", watched)
    fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="gptq",
                     overrides=small(text, **refine("signround")) | {"calibration.dtype": dtype})
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    originals = {name: p.detach() for name, p in model.named_parameters() if "proj" in name}
    assert len(seen) == len(originals)
    assert all(any(torch.equal(weight, p) for p in originals.values()) for weight in seen)


def test_training_that_does_not_help_leaves_what_the_refiner_before_it_made(tiny, text, tmp_path):
    """It starts from codes of its own, nearest to the original weights, and these are dropped with it."""
    norms, lost = refine("norms", rate=0.01), refine("qat", rate=1.0) | {"refine.qat.code_rate": 1.0}
    made = fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="gptq", overrides=small(text, **norms, **lost))
    first, second = made.refined
    assert first["helped"] and not second["helped"]
    assert second["before"] == pytest.approx(first["after"], rel=1e-6)
    fewbits.quantize(tiny("llama"), tmp_path / "norms", recipe="gptq", overrides=small(text, **norms))
    for path in (tmp_path / "norms").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


class Killed(BaseException):
    pass


@pytest.mark.parametrize("at", [0, 1, 3, 4, 6])
def test_resumed_is_the_same(at, tiny, text, tmp_path, monkeypatch):
    """Killed at a check of the refiner (4 of them) or while shards are written anew."""
    args = {"recipe": "gptq", "overrides": small(text, **refine("pv", rate=0.01))}
    fewbits.quantize(tiny("llama"), tmp_path / "whole", **args)
    writes = 0
    replace = checkpoint._sync_and_rename

    def counted(temp: Path, path: Path) -> None:
        nonlocal writes
        if started:
            if writes == at:
                raise Killed
            writes += 1
        replace(temp, path)

    started = False
    save = StateFile.save

    def saved(self: StateFile, state: dict) -> None:
        nonlocal started
        started = True
        save(self, state)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_sync_and_rename", counted)
        patch.setattr(StateFile, "save", saved)
        with pytest.raises(Killed):
            fewbits.quantize(tiny("llama"), tmp_path / "out", **args)
    fewbits.quantize(tiny("llama"), tmp_path / "out", resume=True, **args)
    for path in (tmp_path / "whole").iterdir():
        if path.suffix == ".safetensors":
            assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_refiners_compose_and_quantized_heads_stay(tmp_path, text):
    model = save_tiny_model(tmp_path / "model", "llama-tied")
    overrides = small(text, **refine("norms", rate=0.01), **refine("pv", rate=0.01), lm_head=True, embeddings=True)
    made = fewbits.quantize(model, tmp_path / "out", recipe="gptq", overrides=overrides)
    first, second = made.refined
    assert second["before"] == pytest.approx(first["after"], rel=1e-3) and second["helped"]


def test_recipes_say_what_refines(tmp_path):
    recipe = load_recipe("best-2bit")
    (name,) = recipe.refine
    fast = recipe.with_effort("fast")
    assert fast.refine[name]["samples"] < recipe.refine[name]["samples"] and fast.fingerprint != recipe.fingerprint
    assert recipe.with_effort("best").refine[name]["epochs"] > recipe.refine[name]["epochs"]
    (tmp_path / "r.toml").write_text(fast.to_toml())
    assert load_recipe(str(tmp_path / "r.toml")) == fast
    orders = [load_recipe("gptq", {f"refine.{n}.rate": 0.1 for n in names})
              for names in (("norms", "pv"), ("pv", "norms"))]
    assert [list(r.refine) for r in orders] == [["norms", "pv"], ["pv", "norms"]]
    assert orders[0].fingerprint != orders[1].fingerprint
    with pytest.raises(RecipeError, match="one block before those that tune"):
        load_recipe("gptq", {"refine.pv.rate": 0.1, "refine.gumbel.rate": 0.1})
    with pytest.raises(RecipeError, match="refines nothing"):
        load_recipe("gptq").with_effort("fast")
    with pytest.raises(RecipeError, match=r"refine\.pvv"):
        load_recipe("gptq", {"refine.pvv.rate": 0.1})


def test_rtn_can_be_refined(tiny, text, tmp_path):
    made = fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="rtn",
                            overrides=small(text, **refine("pv", rate=0.01)))
    assert made.refined[0]["helped"] and RTN().needs_stats is False

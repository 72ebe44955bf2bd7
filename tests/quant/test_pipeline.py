"""Quantizing a model, end to end: what is written is what was decided, and what is loaded is what was written.

Stored codes are decoded here with numpy, from the description of the layout and not with the code under test.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import fewbits
from fewbits.calibration.data import load_calibration
from fewbits.eval.divergence import divergence
from fewbits.kernels.linear import PackedMatrix, TiedHead
from fewbits.quant.errors import FormatError, RecipeError
from fewbits.quant.recipe import parse_recipe, tomllib
from tests.conftest import FAMILIES, save_tiny_model

torch.set_num_threads(1)

INDEX = "fewbits.safetensors.index.json"

# Sums of at most 256 float32 products of size 1, in another order: 256 * 2^-24 per linear, ten linears deep, and logits
# of size 5. Seen: 6e-6. Quantization to 4 bits itself moves logits of these models by more than 0.3.
TOLERANCE = 2e-4

TIED = {"llama-tied", "gemma", "opt", "gpt2"}
EMBEDDING = {"llama": "model.embed_tokens", "llama-tied": "model.embed_tokens", "gemma": "model.embed_tokens",
             "opt": "model.decoder.embed_tokens", "gpt2": "transformer.wte"}


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibration text: enough English for 40 rows of 48 tokens, and quick to tokenize."""
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(topics[k] for k in sorted(topics))[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def options(text: Path) -> dict[str, Any]:
    """Overrides that make calibration small."""
    return {"calibration.sources": [str(text)], "calibration.samples": 8, "calibration.seqlen": 48,
            "calibration.true_sequential": False, "calibration.dtype": "float32"}


@pytest.fixture(scope="session")
def made(tiny, options, tmp_path_factory: pytest.TempPathFactory):
    """``made(family, recipe, **overrides) -> Path``: a checkpoint, made once; tests do not write to it."""
    done: dict[str, Path] = {}

    def make(family: str, recipe: str = "gptq", overrides: dict[str, Any] | None = None) -> Path:
        key = f"{family} {recipe} {overrides}"
        if key not in done:
            out = tmp_path_factory.mktemp("made") / "out"
            fewbits.quantize(tiny(family), out, recipe=recipe, overrides={**options, **(overrides or {})})
            done[key] = out
        return done[key]

    return make


# -- reading checkpoints without fewbits ----------------------------------------------------------------------------


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of the shards that the index names."""
    index = json.loads((folder / INDEX).read_text())["weight_map"]
    out: dict[str, Tensor] = {}
    for file in sorted(set(index.values())):
        part = load_file(folder / file)
        assert all(index[name] == file for name in part)
        out |= part
    assert set(out) == set(index)
    return out


def source_tensors(folder: Path) -> dict[str, Tensor]:
    return {k: v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def raw(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def plan_of(folder: Path) -> dict[str, dict[str, Any]]:
    tensors = json.loads((folder / "plan.json").read_text())["tensors"]
    assert len({t["name"] for t in tensors}) == len(tensors)
    return {t["name"]: t for t in tensors}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def bit_stream(words: Tensor, bits: int, count: int) -> np.ndarray:
    """``count`` codes of ``bits`` bits from each row of a dense little-endian bit stream of 32-bit words."""
    stream = np.unpackbits(np.ascontiguousarray(words.numpy()).view(np.uint8), axis=1, bitorder="little")
    return stream[:, : count * bits].reshape(len(words), count, bits) @ (1 << np.arange(bits))


def decode(tensors: dict[str, Tensor], name: str, layout: str) -> Tensor:
    """float32 ``(N, K)`` of a stored weight: ``scale * (code - zero_point)`` over groups of columns."""
    bits = int(re.match(r"int(\d)", layout)[1])
    rows, columns = tensors[f"{name}.weight_shape"].tolist()
    codes = bit_stream(tensors[f"{name}.weight_packed"], bits, columns)
    scale = tensors[f"{name}.weight_scale"].float().numpy()
    if "_sym" in layout:
        zero = np.full_like(scale, 1 << bits >> 1)
    else:
        zero = bit_stream(tensors[f"{name}.weight_zero_point"].T.contiguous(), bits, rows).T
    spread = columns // scale.shape[1]
    if (m := re.search(r"_g(\d+)", layout)) is not None:
        assert int(m[1]) == spread
    else:
        assert spread == columns
    return torch.from_numpy(((codes - zero.repeat(spread, 1)) * scale.repeat(spread, 1)).astype(np.float32))


def quantized(folder: Path) -> dict[str, Tensor]:
    """Name -> decoded ``(N, K)`` of everything that is quantized."""
    tensors, plan = stored(folder), plan_of(folder)
    names = [n.removesuffix(".weight_packed") for n in tensors if n.endswith(".weight_packed")]
    return {n: decode(tensors, n, plan[n]["format"]) for n in names}


def put(model: PreTrainedModel, name: str, weight: Tensor) -> None:
    """Set a weight ``(N, K)`` by the name that checkpoints give it; a tied module stops being tied."""
    if re.search(r"\.experts\.\w+\.\d+$", name):
        path, _, index = name.rpartition(".")
        owner, _, param = path.rpartition(".")
        getattr(model.get_submodule(owner), param).data[int(index)] = weight
        return
    module = model.get_submodule(name)
    module.weight = nn.Parameter((weight.T if isinstance(module, Conv1D) else weight).clone(), requires_grad=False)


def dense_model(source: Path, folder: Path) -> PreTrainedModel:
    """The source model with every quantized weight replaced by what is stored for it."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    for name, weight in quantized(folder).items():
        put(model, name, weight)
    return model.eval()


def logits(model: PreTrainedModel, length: int = 12) -> Tensor:
    ids = torch.arange(3, 3 + 2 * length).view(2, length)
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def assert_same_model(model: PreTrainedModel, dense: PreTrainedModel, tolerance: float = TOLERANCE) -> None:
    for length in (1, 12):  # one token and many take different kernels
        torch.testing.assert_close(logits(model, length), logits(dense, length), rtol=0, atol=tolerance)


def block_linears(source: Path) -> dict[str, tuple[int, int]]:
    """Linears of the decoder blocks by the names that checkpoints give them, experts one by one, with their shapes."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(source))
    out: dict[str, tuple[int, int]] = {}
    for path, module in model.named_modules():
        if not re.search(r"\.(layers|h)\.\d+\.", path):
            continue
        if isinstance(module, nn.Linear):
            out[path] = (module.out_features, module.in_features)
        elif isinstance(module, Conv1D):
            out[path] = (module.weight.shape[1], module.weight.shape[0])
        for name, p in module.named_parameters(recurse=False):
            if p.ndim == 3:
                out |= {f"{path}.{name}.{e}": (p.shape[1], p.shape[2]) for e in range(p.shape[0])}
    return out


# -- what is written is what is loaded ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["gptq", "rtn"])
@pytest.mark.parametrize("family", FAMILIES)
def test_loads_saves_and_generates_as_the_dequantized_model(family, recipe, made, tiny, tmp_path):
    folder = made(family, recipe)
    dense = dense_model(tiny(family), folder)
    assert quantized(folder).keys() == block_linears(tiny(family)).keys()
    original = AutoModelForCausalLM.from_pretrained(tiny(family))
    assert (logits(dense) - logits(original)).abs().max() > 0.1, "the test cannot tell quantized from original"

    model = fewbits.load(folder)
    assert_same_model(model, dense)
    prompt = torch.tensor([[1, 5, 9, 30]])
    kwargs = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(prompt, **kwargs), dense.generate(prompt, **kwargs))

    model.save_pretrained(tmp_path)
    before, after = stored(folder), stored(tmp_path)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and raw(tensor) == raw(after[name]), name
    assert config_of(tmp_path) == config_of(folder)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_rtn_stores_the_nearest_codes(made, tiny):
    """Each stored weight is the nearest of the 16 values of its group, by brute force."""
    source, folder = source_tensors(tiny("llama")), made("llama", "rtn")
    tensors = stored(folder)
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        weight, got = source[f"{name}.weight"], quantized(folder)[name]
        scale = tensors[f"{name}.weight_scale"].float()
        packed = tensors[f"{name}.weight_zero_point"].T.contiguous()
        zero = torch.from_numpy(bit_stream(packed, 4, len(weight)).T.copy())
        values = (torch.arange(16) - zero.unsqueeze(-1)) * scale.unsqueeze(-1)  # (N, G, 16)
        spread = weight.shape[1] // scale.shape[1]
        distance = (weight.unsqueeze(-1) - values.repeat_interleave(spread, 1)).abs()
        assert ((weight - got).abs() - distance.amin(-1)).abs().max() < 1e-6
        assert (weight - got).abs().max() < 1.01 * scale.max()


# -- sources ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [None, "20KB"], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama-tied", "opt", "gpt2", "qwen3-moe"])
def test_what_is_not_quantized_is_carried_byte_for_byte(family, dtype, shards, tmp_path):
    source = save_tiny_model(tmp_path / "source", family, dtype=dtype, max_shard_size=shards)
    assert (len(list(source.glob("*.safetensors"))) > 1) == (shards is not None)
    fewbits.quantize(source, tmp_path / "out", recipe="rtn")
    before, after = source_tensors(source), stored(tmp_path / "out")
    carried = {n for n in before if n in after}
    for name in carried:
        assert before[name].dtype == after[name].dtype and before[name].shape == after[name].shape
        assert raw(before[name]) == raw(after[name]), name
    lost = {re.sub(r"\.experts\.\d+\..*", ".experts", n.removesuffix(".weight")) for n in before.keys() - carried}
    packed = {re.sub(r"\.experts\..*", ".experts", n) for n in quantized(tmp_path / "out")}
    assert lost == packed, "a tensor of the source is neither carried nor quantized"
    made_up = {n for n in after if n not in before and not re.search(r"\.weight_(packed|scale|zero_point|shape)$", n)}
    assert not made_up
    biases = [n for n in before if n.endswith(".bias")]
    assert (len(biases) > 0) == (family in ("opt", "gpt2")) and carried.issuperset(biases)
    if family in ("opt", "gpt2"):
        assert_same_model(fewbits.load(tmp_path / "out"), dense_model(source, tmp_path / "out"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_sources_calibrate(dtype, tmp_path, options):
    source = save_tiny_model(tmp_path / "source", "llama", dtype=dtype)
    fewbits.quantize(source, tmp_path / "out", overrides=options)
    assert_same_model(fewbits.load(tmp_path / "out"), dense_model(source, tmp_path / "out"))
    weights = source_tensors(source)
    for name, got in quantized(tmp_path / "out").items():
        weight = weights[f"{name}.weight"].float()
        assert (got - weight).norm() / weight.norm() < 0.25, name  # 4 bits of a normal: 0.1 to 0.15; wrong: about 1


def test_sharding_of_the_source_changes_no_tensor(tiny, made, tmp_path, options):
    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny("llama")).save_pretrained(tmp_path / "source")
    fewbits.quantize(tmp_path / "source", tmp_path / "out", overrides=options)
    one, many = stored(made("llama")), stored(tmp_path / "out")
    assert one.keys() == many.keys() and all(raw(one[n]) == raw(many[n]) for n in one)


def test_other_files_come_along_and_the_source_stays_as_it_was(tmp_path, options):
    source = save_tiny_model(tmp_path / "source", "llama", chat=True)
    (source / "LICENSE").write_text("a licence")
    (source / "README.md").write_text("# a model")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("x")
    before = {str(p.relative_to(source)): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    assert {"generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= before.keys()
    assert any("chat_template" in n for n in before)
    stamps = {p: p.stat().st_mtime_ns for p in source.rglob("*")}
    fewbits.quantize(source, tmp_path / "out", overrides=options)
    assert {str(p.relative_to(source)): p.read_bytes() for p in source.rglob("*") if p.is_file()} == before
    assert {p: p.stat().st_mtime_ns for p in source.rglob("*")} == stamps
    after = {str(p.relative_to(tmp_path / "out")): p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    for name, content in before.items():
        if name == "README.md":  # ours, with the model's own at its end
            card = after.pop(name)
            assert card.endswith(content) and len(card) > len(content)
        elif name not in ("config.json", "model.safetensors"):
            assert after.pop(name) == content, name
    shards = {f"fewbits-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)}
    assert after.keys() == {"config.json", "recipe.toml", "plan.json", "fewbits.lock", INDEX, *shards}
    config, original = json.loads(after["config.json"]), json.loads(before["config.json"])
    config.pop("quantization_config")
    assert config == original
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("Hello")["input_ids"] == AutoTokenizer.from_pretrained(source)("Hello")["input_ids"]
    assert tokenizer.chat_template


def test_recipe_and_lock_say_how_it_was_made(made, tiny, options):
    folder = made("llama")
    data = tomllib.loads((folder / "recipe.toml").read_text())
    assert parse_recipe(data).calibration.samples == 8 and data["quantizer"]["name"] == "gptq"
    lock = json.loads((folder / "fewbits.lock").read_text())
    assert lock["recipe"] == parse_recipe(data).fingerprint and lock["seed"] == 0
    for name, digest in lock["model"]["files"].items():
        assert hashlib.sha256((tiny("llama") / name).read_bytes()).hexdigest() == digest
    for name, digest in lock["shards"].items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert len(lock["shards"]) == 3 and lock["calibration"]["rows"] == 8
    assert "torch" in lock["versions"] and lock["threads"] == 1
    assert str(folder) not in json.dumps(lock), "the same run elsewhere would write another lock"


# -- accounts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overrides", [{}, {"keep": ["*.q_proj", "*.fc2", "*.mlp.c_proj", "*.0.*down_proj*"]},
                                       {"lm_head": True, "embeddings": True, "format.bits": 3}],
                         ids=["default", "keep", "all"])
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3-moe", "opt", "gpt2"])
def test_every_stored_byte_is_in_the_plan(family, overrides, tiny, options, tmp_path):
    source, out = save_tiny_model(tmp_path / "source", family, dtype=torch.bfloat16), tmp_path / "out"
    report = fewbits.quantize(source, out, recipe="rtn", overrides=overrides)
    tensors, plan = stored(out), plan_of(out)
    by_name: dict[str, int] = {}
    for key, tensor in tensors.items():
        owner = re.sub(r"\.weight(_\w+)?$", "", key)
        name = owner if owner in plan else key
        by_name[name] = by_name.get(name, 0) + tensor.nbytes
    assert by_name == {n: t["bytes"] for n, t in plan.items()}
    assert json.loads((out / INDEX).read_text())["metadata"]["total_size"] == sum(by_name.values())
    assert report.bytes == sum(p.stat().st_size for p in out.glob("*.safetensors"))

    linears = block_linears(source)
    bits = weights = 0
    fused = {re.sub(r"\.\d+$", "", n) for n in linears if ".experts." in n}
    for name in [n for n in linears if n in plan] + [n for n in fused if n in plan]:
        bits += 8 * by_name[name]
        weights += int(np.prod(plan[name]["shape"]))
    assert weights == sum(n * k for n, k in linears.values()), "a linear of a block is missing from the plan"
    assert report.bits_per_weight == pytest.approx(bits / weights)
    everything = sum(int(np.prod(t["shape"])) for t in plan.values())
    assert report.bits_per_weight_total == pytest.approx(8 * sum(by_name.values()) / everything)
    for name, fact in plan.items():
        assert fact["bits_per_weight"] == pytest.approx(8 * fact["bytes"] / np.prod(fact["shape"])), name
    if "keep" in overrides:
        kept = [t for n, t in plan.items() if t["format"] == "bfloat16" and (n in linears or n in fused)]
        assert kept and all(t["bits_per_weight"] == 16 for t in kept)
        assert report.bits_per_weight > 5
    else:
        assert report.bits_per_weight < 5


def test_report(tiny, options, tmp_path):
    report = fewbits.quantize(tiny("llama"), tmp_path / "out", overrides=options)
    assert 0 < report.seconds_calibration < report.seconds and 0 < report.seconds_quantization < report.seconds
    assert report.cpu_seconds > 0 and report.peak_rss_bytes > 50e6
    assert report.output == str(tmp_path / "out") and report.measured is None
    losses = {n: t["relative_loss"] for n, t in plan_of(tmp_path / "out").items() if "relative_loss" in t}
    assert report.worst == sorted(losses, key=losses.get, reverse=True)[:5]


def test_progress_ends_when_the_work_does(tiny, options, tmp_path):
    seen: list[tuple[str, int, int]] = []
    fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="rtn", progress=lambda *a: seen.append(a))
    assert seen == [("Quantizing", i, 3) for i in (1, 2, 3)]


# -- heads, embeddings, rules, keep --------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["lm_head", "embeddings", "both"])
@pytest.mark.parametrize("family", sorted(EMBEDDING))
def test_heads_and_embeddings(family, which, made, tiny, tmp_path):
    overrides = {key: True for key in ("lm_head", "embeddings") if which in (key, "both")}
    folder = made(family, "gptq", {**overrides, "format.bits": 6})
    shared = family in TIED and which != "lm_head"  # one table, stored once
    names = {"lm_head"} if which == "lm_head" else {EMBEDDING[family]}
    names |= {"lm_head"} if which == "both" and not shared else set()
    assert quantized(folder).keys() == block_linears(tiny(family)).keys() | names
    assert ("lm_head.weight" in stored(folder)) == (which == "embeddings" and not shared)

    dense = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    head = dense.get_output_embeddings()
    original = dense.get_input_embeddings().weight
    assert (head.weight is original) == (family in TIED)
    for name, weight in quantized(folder).items():
        put(dense, name, weight)
    if shared:
        head.weight = dense.get_input_embeddings().weight
    model = fewbits.load(folder)
    assert isinstance(model.get_output_embeddings(), PackedMatrix) == ("lm_head" in names)
    assert isinstance(model.get_output_embeddings(), TiedHead) == shared
    assert isinstance(model.get_input_embeddings(), PackedMatrix) == (which != "lm_head")
    assert_same_model(model, dense)
    model.save_pretrained(tmp_path)
    assert_same_model(fewbits.load(tmp_path), dense)
    if "lm_head" in names:  # an output head is calibrated: its loss is that of outputs
        assert plan_of(folder)["lm_head"]["n_tokens"] == 8 * 48


def test_rules_first_match_wins_and_names_heads_and_experts(made, tiny):
    rules = [
        {"match": "*.0.self_attn.q_proj", "format": "keep"},
        {"match": "*.self_attn.[qk]_proj", "format": "int8_sym_row_bf16"},
        {"match": "*.experts.down_proj.[01]", "format": "int2_g16"},
        {"match": "lm_head", "format": "int6_g32"},
        {"match": "*.self_attn.*", "format": "int5_g64_f32"},
    ]
    folder = made("qwen3-moe", "gptq", {"rules": rules, "format.bits": 3, "format.group_size": 32})
    got = {n: plan_of(folder)[n]["format"] for n in quantized(folder)}
    for name, fmt in got.items():
        expected = (
            "int8_sym_row_bf16" if re.search("[qk]_proj", name) else "int5_g64_f32" if "self_attn" in name
            else "int2_g16" if re.search(r"down_proj\.[01]$", name) else "int6_g32" if name == "lm_head" else "int3_g32"
        )
        assert fmt == expected, name
    assert "model.layers.0.self_attn.q_proj" not in got and "model.layers.1.self_attn.q_proj" in got
    assert plan_of(folder)["model.layers.0.self_attn.q_proj"]["format"] == "float32"
    config = config_of(folder)
    assert config["default"] == "int3_g32" and config["keep"] == ["model.layers.0.self_attn.q_proj"]
    assert config["exceptions"] == {n: f for n, f in got.items() if f != "int3_g32"}
    assert_same_model(fewbits.load(folder), dense_model(tiny("qwen3-moe"), folder))


def test_keep(made, tiny):
    folder = made("qwen3-moe", "gptq", {"keep": ["*.0.mlp.experts.gate_up_proj.*", "*.1.self_attn.*"]})
    names, source = quantized(folder).keys(), source_tensors(tiny("qwen3-moe"))
    assert not [n for n in names if ".0.mlp.experts.gate_up" in n or ".1.self_attn" in n]
    assert [n for n in names if ".1.mlp.experts.gate_up" in n and ".0.self_attn" not in n]
    tensors = stored(folder)
    name = "model.layers.1.self_attn.o_proj.weight"
    assert raw(tensors[name]) == raw(source[name])
    fused = AutoModelForCausalLM.from_pretrained(tiny("qwen3-moe")).model.layers[0].mlp.experts.gate_up_proj
    assert raw(tensors["model.layers.0.mlp.experts.gate_up_proj"]) == raw(fused.detach())
    assert_same_model(fewbits.load(folder), dense_model(tiny("qwen3-moe"), folder))


def test_experts_cannot_be_kept_one_by_one(tiny, options, tmp_path):
    with pytest.raises(RecipeError, match=r"experts.*keep all of them or none"):
        fewbits.quantize(tiny("qwen3-moe"), tmp_path / "out", overrides={**options, "keep": ["*.down_proj.2"]})
    assert not (tmp_path / "out").exists()


def test_keeping_everything_is_an_error(tiny, tmp_path):
    with pytest.raises(RecipeError, match="keep: leaves nothing to quantize"):
        fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="rtn", overrides={"keep": ["*"]})
    assert not (tmp_path / "out").exists()


def test_experts_that_see_too_little_text_are_named_and_still_quantized(tiny, options, tmp_path):
    few = {**options, "calibration.samples": 1, "calibration.seqlen": 16}
    report = fewbits.quantize(tiny("qwen3-moe"), tmp_path / "out", overrides=few)
    assert any("expert" in w for w in report.warnings)
    assert quantized(tmp_path / "out").keys() == block_linears(tiny("qwen3-moe")).keys()
    weights = AutoModelForCausalLM.from_pretrained(tiny("qwen3-moe")).model.layers[1].mlp.experts.down_proj.detach()
    for e in range(4):  # pooled statistics of the layer, not garbage
        got = quantized(tmp_path / "out")[f"model.layers.1.mlp.experts.down_proj.{e}"]
        assert (got - weights[e]).norm() / weights[e].norm() < 0.25
    assert torch.isfinite(logits(fewbits.load(tmp_path / "out"))).all()


def test_a_format_that_does_not_fit_names_tensor_and_way_out(tiny, tmp_path):
    with pytest.raises(FormatError, match=r"layers\.0\.self_attn\.q_proj: K = 64 is not a multiple of group_size 48; "
                                          r"choose one that divides it \(16, 32, 64\).*keep"):
        fewbits.quantize(tiny("llama"), tmp_path / "out", recipe="rtn", overrides={"format.group_size": 48})
    assert not (tmp_path / "out").exists()


# -- statistics -------------------------------------------------------------------------------------------------------


def calibration_rows(source: Path, options: dict[str, Any]) -> Tensor:
    text = load_calibration(options["calibration.sources"], AutoTokenizer.from_pretrained(source),
                            samples=options["calibration.samples"], seqlen=options["calibration.seqlen"], seed=0)
    assert bool(text.mask.all())
    return text.tokens


def inputs_of(model: PreTrainedModel, rows: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Inputs ``(T, K)`` of linears, seen by hooks in a whole model."""
    seen: dict[str, list[Tensor]] = {n: [] for n in names}
    hooks = [model.get_submodule(n).register_forward_pre_hook(
        lambda module, args, n=n: seen[n].append(args[0].reshape(-1, args[0].shape[-1]).float())) for n in names]
    with torch.no_grad():
        for row in rows:
            model(row[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {n: torch.cat(x) for n, x in seen.items()}


@pytest.mark.parametrize("inputs", ["quantized", "original", "true_sequential"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "opt", "gpt2"])
def test_losses_are_those_of_the_whole_model(family, inputs, made, tiny, options):
    """Streaming sees what hooks see in the whole model, with what came before quantized as the recipe says."""
    sequential = inputs == "true_sequential"
    key = {"calibration.true_sequential": True} if sequential else {"calibration.inputs": inputs}
    folder = made(family, "gptq", key)
    model = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    rows, plan, stored_weights = calibration_rows(tiny(family), options), plan_of(folder), quantized(folder)
    for index in range(2):
        names = [n for n in plan if n in stored_weights and re.search(rf"\.{index}\.", n)]  # in the order of the work
        assert len(names) >= 4
        seen = {} if sequential else inputs_of(model, rows, names)
        for name in names:
            x = inputs_of(model, rows, [name])[name] if sequential else seen[name]
            module = model.get_submodule(name)
            weight = module.weight.T if isinstance(module, Conv1D) else module.weight
            weight = weight.detach()
            error = float((x @ (stored_weights[name] - weight).T).square().sum())
            power = float((x @ weight.T).square().sum())
            assert plan[name]["n_tokens"] == len(x) == 8 * 48
            assert plan[name]["proxy_loss"] == pytest.approx(error / len(x), rel=2e-3), name
            assert plan[name]["relative_loss"] == pytest.approx(error / power, rel=2e-3), name
            if sequential:
                put(model, name, stored_weights[name])
        if inputs == "quantized":
            for name in names:
                put(model, name, stored_weights[name])


@pytest.mark.parametrize("skip", [0, 3])
def test_losses_of_experts_are_over_the_tokens_routed_to_them(skip, made, tiny, options):
    folder = made("qwen3-moe", "gptq", {"calibration.skip_tokens": skip} if skip else {})
    model = AutoModelForCausalLM.from_pretrained(tiny("qwen3-moe"), dtype=torch.float32).eval().requires_grad_(False)
    rows, plan, stored_weights = calibration_rows(tiny("qwen3-moe"), options), plan_of(folder), quantized(folder)
    mlp = model.model.layers[0].mlp
    x = inputs_of(model, rows, ["model.layers.0.mlp"])["model.layers.0.mlp"]
    chosen = (x @ mlp.gate.weight.T).topk(2).indices  # (T, 2) experts of each token
    counted = torch.arange(len(x)) % 48 >= skip
    for e, weight in enumerate(mlp.experts.gate_up_proj):
        name = f"model.layers.0.mlp.experts.gate_up_proj.{e}"
        routed = x[(chosen == e).any(1) & counted]
        assert plan[name]["n_tokens"] == len(routed) >= 64
        loss = float((routed @ (stored_weights[name] - weight).T).square().sum()) / len(routed)
        assert plan[name]["proxy_loss"] == pytest.approx(loss, rel=2e-3)


def shards(folder: Path) -> list[bytes]:
    return [p.read_bytes() for p in sorted(folder.glob("fewbits-*.safetensors"))]


def test_inputs_original_differs_only_after_the_first_block(made):
    one, two = shards(made("llama")), shards(made("llama", "gptq", {"calibration.inputs": "original"}))
    assert one[0] == two[0] and one[1] == two[1] and one[2] != two[2]


def test_qep_corrects_from_the_second_block_on(made, tiny, options):
    folder = made("llama", "gptq", {"quantizer.qep": 0.5})
    plain, qep = shards(made("llama")), shards(folder)
    assert plain[1] == qep[1] and plain[2] != qep[2]
    shift = {n: t["qep_shift"] for n, t in plan_of(folder).items() if "qep_shift" in t}
    assert all(v == 0 for n, v in shift.items() if ".0." in n) and all(v > 0 for n, v in shift.items() if ".1." in n)
    assert len(shift) == 14
    assert_same_model(fewbits.load(folder), dense_model(tiny("llama"), folder))


def test_qep_brings_outputs_nearer_to_the_original(made, tiny, options):
    """What QEP is for: the second block's first linears reproduce the original outputs better from quantized inputs."""
    original = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval().requires_grad_(False)
    names = [f"model.layers.1.self_attn.{n}_proj" for n in "qkv"]
    rows = calibration_rows(tiny("llama"), options)
    wanted = {n: x @ original.get_submodule(n).weight.T for n, x in inputs_of(original, rows, names).items()}
    error = {}
    for strength in (0.0, 1.0):
        more = {"quantizer.qep": strength, "quantizer.qep_damp": 0.1, "format.bits": 3}
        model = dense_model(tiny("llama"), made("llama", "gptq", more))
        error[strength] = sum(
            float((x @ model.get_submodule(n).weight.T - wanted[n]).square().sum())
            for n, x in inputs_of(model, rows, names).items())
    assert error[1.0] < 0.95 * error[0.0]


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_true_sequential_lets_later_linears_see_earlier_ones(family, made, tiny):
    folder = made(family, "gptq", {"calibration.true_sequential": True})
    plain, sequential = stored(made(family)), stored(folder)
    changed = {n.rpartition(".")[0] for n in plain if raw(plain[n]) != raw(sequential[n])}
    last = "fc2" if family == "opt" else "mlp.down_proj"
    block = "model.decoder.layers.0" if family == "opt" else "model.layers.0"
    assert not changed & {f"{block}.self_attn.{n}_proj" for n in "qkv"}, "the first step sees what it saw before"
    assert f"{block}.{last}" in changed
    assert_same_model(fewbits.load(folder), dense_model(tiny(family), folder))


def test_true_sequential_and_qep_together_on_experts(made, tiny):
    folder = made("qwen3-moe", "gptq", {"calibration.true_sequential": True, "quantizer.qep": 0.5})
    assert_same_model(fewbits.load(folder), dense_model(tiny("qwen3-moe"), folder))


def test_skip_tokens(made, tiny):
    folder = made("qwen3-moe", "gptq", {"calibration.skip_tokens": 3})
    counts = {n: t["n_tokens"] for n, t in plan_of(folder).items() if "n_tokens" in t}
    assert {c for n, c in counts.items() if "self_attn" in n} == {8 * 45}
    routed = [c for n, c in counts.items() if ".0.mlp.experts.gate_up" in n]
    assert sum(routed) == 2 * 8 * 45, "each token goes to two experts"
    assert shards(folder)[1] != shards(made("qwen3-moe"))[1]


@pytest.mark.parametrize("more", [
    {"calibration.dtype": "bfloat16"}, {"quantizer.act_order": False}, {"quantizer.clip": "minmax"},
    {"quantizer.damp": 0.1}, {"calibration.order": "first"}, {"format.symmetric": True},
    {"format.scale_dtype": "bfloat16"}, {"format.group_size": "row"}, {"format.group_size": 16},
], ids=str)
def test_options_change_the_result_and_it_loads(more, made, tiny):
    folder = made("llama", "gptq", more)
    assert shards(folder)[1] != shards(made("llama"))[1]
    dense = dense_model(tiny("llama"), folder)
    assert_same_model(fewbits.load(folder), dense)
    original = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    error = (logits(dense) - logits(original)).norm() / logits(original).norm()
    assert 0.01 < error < 0.5


def test_a_seed_draws_other_rows(tiny, options, made, tmp_path):
    fewbits.quantize(tiny("llama"), tmp_path / "out", overrides=options, seed=1)
    assert shards(tmp_path / "out")[1] != shards(made("llama"))[1]


def test_calibration_on_text_of_the_models_own(tiny, tmp_path):
    own = {"calibration.sources": ["self"], "calibration.samples": 4, "calibration.seqlen": 24}
    fewbits.quantize(tiny("llama"), tmp_path / "out", overrides=own)
    assert_same_model(fewbits.load(tmp_path / "out"), dense_model(tiny("llama"), tmp_path / "out"))


@pytest.mark.parametrize("family, more", [
    ("llama", {}), ("opt", {"quantizer.qep": 0.5}), ("gpt2", {"calibration.skip_tokens": 2}),
    ("gemma", {"lm_head": True}),
])
def test_keeping_passes_open_changes_no_byte(family, more, tiny, options, made, tmp_path, monkeypatch):
    """Sequential calibration in one pass that waits for each linear, or in one pass from the start for each."""
    more = {**more, "calibration.true_sequential": True}
    monkeypatch.setattr("fewbits.calibration.collect.PAUSED_LIMIT_BYTES", 0)
    fewbits.quantize(tiny(family), tmp_path / "out", overrides={**options, **more})
    assert shards(tmp_path / "out") == shards(made(family, "gptq", more))


@pytest.mark.parametrize("knob", ["hidden states on disk", "batch", "block_size"])
def test_speed_knobs_change_at_most_rounding(knob, tiny, options, made, tmp_path, monkeypatch):
    more: dict[str, Any] = {}
    if knob == "hidden states on disk":
        monkeypatch.setattr("fewbits.calibration.collect.HIDDEN_LIMIT_BYTES", 0)
    elif knob == "batch":
        monkeypatch.setattr("fewbits.calibration.collect.BATCH_TOKENS", 100)
    else:
        more = {"quantizer.block_size": 16}
    fewbits.quantize(tiny("llama"), tmp_path / "out", overrides={**options, **more})
    if knob == "hidden states on disk":
        assert shards(tmp_path / "out") == shards(made("llama"))
    one, two = quantized(made("llama")), quantized(tmp_path / "out")
    different = sum(int((one[n] != two[n]).sum()) for n in one)
    assert different <= 1e-4 * sum(w.numel() for w in one.values())


# -- quality ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3-moe"])
def test_gptq_beats_rtn_on_held_out_text(family, made, tiny, text):
    tokens = torch.tensor(AutoTokenizer.from_pretrained(tiny(family))(text.read_text()[::-1])["input_ids"])
    rows = list(tokens[: 12 * 96].view(12, 96))  # the text backwards: nothing that was calibrated on
    original = AutoModelForCausalLM.from_pretrained(tiny(family), dtype=torch.float32).eval()
    kl = {r: divergence(fewbits.load(made(family, r, {"format.bits": 3})), original, rows) for r in ("gptq", "rtn")}
    margin = 2 * (kl["gptq"].kl_stderr + kl["rtn"].kl_stderr)
    assert kl["gptq"].kl_mean + margin < kl["rtn"].kl_mean


def test_more_bits_are_better(made, tiny):
    original = AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()
    errors = [float((logits(fewbits.load(made("llama", "gptq", {"format.bits": b}))) - logits(original)).norm())
              for b in (2, 3, 4, 6, 8)]
    assert all(a > 1.3 * b for a, b in itertools.pairwise(errors))

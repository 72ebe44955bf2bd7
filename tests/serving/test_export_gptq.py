"""GPTQ: decoded as the layout is defined, with code of the test's own, it gives our integers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fewbits
from fewbits.quant.errors import FormatError
from fewbits.serving.export import export
from fewbits.serving.export.stored import open_stored
from tests.conftest import save_tiny_model
from tests.serving.exporting import SYMMETRIC, config_of, every_format, local, tensors_of
from tests.vision import save_llava

# Odd multiples of 32, which is what the layout takes.
SHAPES = {
    "96x160": {"hidden_size": 96, "intermediate_size": 160, "head_dim": 24, "num_key_value_heads": 4},
    "192x96": {"hidden_size": 192, "intermediate_size": 96, "head_dim": 8, "num_key_value_heads": 4},
}
FORMATS = {"format__group_size": 32, **SYMMETRIC}


def decode(tensors: dict[str, Tensor], bits: int, *, checkpoint_format: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes ``(N, K)``, zero points and scales ``(N, G)``, bit by bit: value ``j`` is bits ``[j*b, (j+1)*b)``."""
    def unpack(words: Tensor) -> Tensor:  # along dimension 0
        stream = [(words >> bit & 1) for bit in range(32)]
        flat = torch.stack(stream, dim=1).reshape(-1, words.shape[1]).view(-1, bits, words.shape[1])
        return sum(flat[:, i] << i for i in range(bits))

    zero = unpack(tensors["qzeros"].T)
    if checkpoint_format == "gptq":
        zero = zero + 1
    return unpack(tensors["qweight"]).T, zero, tensors["scales"].T


def rule_for(config: dict, name: str) -> dict | None:
    """How GPTQModel, vLLM and SGLang read ``dynamic``: the first rule that matches wins; None: not quantized."""
    for rule, fields in config["dynamic"].items():
        if re.match(rule[2:], name):
            return None if rule.startswith("-:") else config | fields
    return config


def to_gptq(folder: Path, out: Path, *allow: str) -> dict:
    """Export; returns the quantization_config."""
    export(folder, out, to="gptq", allow=allow)
    return config_of(out)["quantization_config"]


# -- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [(True,), (False,), (True, False)])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_format_decodes_to_our_integers(shape, symmetric, quantized, tmp_path):
    source, formats = every_format(tmp_path / "model", SHAPES[shape], (4, 8), symmetric)
    folder = quantized(source, formats)
    config = to_gptq(folder, tmp_path / "out", "asymmetric")
    assert config["checkpoint_format"] == ("gptq" if symmetric == (True,) else "gptq_v2")
    stored, tensors = open_stored(folder), tensors_of(tmp_path / "out")
    assert set(stored.matrices) == set(formats) and not config["desc_act"]
    for name, fmt in formats.items():
        ours, theirs = stored.read(name), local(tensors, name)
        (segment,) = ours.segments
        rule = rule_for(config, name)
        assert segment.format.name == fmt and rule is not None
        codes, zero, scale = decode(theirs, rule["bits"], checkpoint_format=config["checkpoint_format"])
        assert torch.equal(codes, segment.codes.int())
        assert torch.equal(scale, segment.params["scale"]) and scale.dtype == torch.float16
        expected = segment.params["zero_point"].int() if "zero_point" in segment.params else segment.format.levels // 2
        assert bool((zero == expected).all())
        columns = ours.shape[1]
        group = columns if rule["group_size"] == -1 else rule["group_size"]
        assert torch.equal(theirs["g_idx"], (torch.arange(columns) // group).int())
        assert rule["sym"] == segment.format.symmetric
        value = scale.float()[:, theirs["g_idx"].long()] * (codes - zero[:, theirs["g_idx"].long()])
        assert torch.equal(value, ours.dequantize())
        assert {k: t.dtype for k, t in theirs.items()} == {
            "qweight": torch.int32, "qzeros": torch.int32, "scales": torch.float16, "g_idx": torch.int32}


def test_zero_point_0_survives(quantized, tmp_path):
    """The first version of the layout stores zero points less one, and could not."""
    source, name = save_tiny_model(tmp_path / "model", "llama"), "model.layers.0.self_attn.q_proj"
    weights = load_file(source / "model.safetensors")
    weights[f"{name}.weight"].abs_()
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    folder = quantized(source, format__group_size=32)
    config = to_gptq(folder, tmp_path / "out", "asymmetric")
    assert config["checkpoint_format"] == "gptq_v2" and not config["sym"]
    _, zero, _ = decode(local(tensors_of(tmp_path / "out"), name), 4, checkpoint_format="gptq_v2")
    assert (zero == 0).all()


# -- configuration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "gemma", "phi", "opt"])
def test_uniform(family, quantized, tmp_path):
    folder = quantized(family, **FORMATS)
    report = export(folder, tmp_path / "out", to="gptq")
    config = config_of(tmp_path / "out")["quantization_config"]
    assert report.warnings == []
    assert {k: config[k] for k in ("quant_method", "bits", "group_size", "sym", "desc_act", "lm_head")} == {
        "quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False, "lm_head": False}
    assert config["dynamic"] == {"-:^lm_head$": {}}
    tensors, stored = tensors_of(tmp_path / "out"), open_stored(folder)
    assert set(tensors) == {*stored.dense_names, *(f"{n}.{k}" for n in stored.matrices
                                                   for k in ("qweight", "qzeros", "scales", "g_idx"))}


def test_mixture_matches_fused_names_too(quantized, tmp_path):
    formats = {"*.1.self_attn.o_proj": "keep", "*.self_attn.*": "int8_sym_row", "*.0.mlp.[gu]*": "int4_sym_g16"}
    folder = quantized("llama", formats, **FORMATS)
    report = export(folder, tmp_path / "out", to="gptq")
    assert len(report.warnings) == 1 and "transformers ignores" in report.warnings[0]
    config, stored = config_of(tmp_path / "out")["quantization_config"], open_stored(folder)
    for name, (_, layout) in stored.matrices.items():
        fmt, rule = layout.runs[0][0], rule_for(config, name)
        assert rule and (rule["bits"], rule["group_size"]) == (fmt.code_bits, fmt.group_size or -1)
    assert rule_for(config, "model.layers.1.self_attn.o_proj") is None
    for layer in range(2):
        assert rule_for(config, f"model.layers.{layer}.self_attn.qkv_proj")["bits"] == 8
        assert rule_for(config, f"model.layers.{layer}.mlp.gate_up_proj")["group_size"] == (32, 16)[layer == 0]
    for other in ("model.layers.10.self_attn.qkv_proj", "model.layers.0.mlp.up_proj_2"):
        assert rule_for(config, other) is config, "rules are to match whole names"


@pytest.mark.parametrize("odd_one", ["int8_sym_g32", "keep"])
def test_linears_that_engines_fuse_but_differ_are_warned_of(odd_one, quantized, tmp_path):
    folder = quantized("llama", {"*.1.self_attn.k_proj": odd_one}, **FORMATS)
    report = export(folder, tmp_path / "out", to="gptq")
    assert any("model.layers.1.self_attn.q_proj" in w and "vLLM" in w and "(1 such" in w for w in report.warnings)
    config = config_of(tmp_path / "out")["quantization_config"]
    assert rule_for(config, "model.layers.1.self_attn.q_proj")["bits"] == 4
    found = rule_for(config, "model.layers.1.self_attn.k_proj")
    assert found is None if odd_one == "keep" else found["bits"] == 8


def test_quantized_head(quantized, tmp_path):
    folder = quantized("llama-tied", lm_head=True, **FORMATS)
    config = to_gptq(folder, tmp_path / "out")
    assert config["lm_head"] and config["dynamic"] == {}
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is False
    assert "lm_head.qweight" in tensors_of(tmp_path / "out")


def test_experts(quantized, tmp_path):
    folder = quantized("qwen3-moe", {"*.1.mlp.experts*": "int8_sym_g32", "*.self_attn.*": "int4_sym_g16"}, **FORMATS)
    config = to_gptq(folder, tmp_path / "out")
    stored, tensors = open_stored(folder), tensors_of(tmp_path / "out")
    assert rule_for(config, "model.layers.1.mlp.experts")["bits"] == 8, "engines ask for all experts of a layer at once"
    assert rule_for(config, "model.layers.0.mlp.experts")["bits"] == 4
    assert rule_for(config, "model.layers.1.mlp.gate") is None, "a router is a linear to other engines"
    for layer, bits in ((0, 4), (1, 8)):
        whole = stored.read(f"model.layers.{layer}.mlp.experts.gate_up_proj.3")
        name = f"model.layers.{layer}.mlp.experts.3.up_proj"
        assert rule_for(config, name)["bits"] == bits
        codes, _, _ = decode(local(tensors, name), bits, checkpoint_format="gptq")
        assert torch.equal(codes, whole.segments[0].codes[32:].int())


def test_kept_experts(quantized, tmp_path):
    config = to_gptq(quantized("qwen3-moe", {"*.1.mlp.experts*": "keep"}, **FORMATS), tmp_path / "out")
    assert rule_for(config, "model.layers.1.mlp.experts") is None
    assert rule_for(config, "model.layers.1.mlp.experts.2.up_proj") is None
    assert rule_for(config, "model.layers.0.mlp.experts")["bits"] == 4


def test_vision_language_model(quantized, tmp_path):
    folder = quantized(save_llava(tmp_path / "model"), {"*.0.mlp.*": "int8_sym_g32"}, **FORMATS)
    config, tensors = to_gptq(folder, tmp_path / "out"), tensors_of(tmp_path / "out")
    assert "language_model.model.layers.0.mlp.up_proj.qweight" in tensors
    for text in ("language_model.model", "model.language_model"):  # on the hub, and in the model
        assert rule_for(config, f"{text}.layers.0.mlp.gate_up_proj")["bits"] == 8
        assert rule_for(config, f"{text}.layers.1.mlp.up_proj")["bits"] == 4
    for tower in ("vision_tower.encoder", "model.vision_tower.encoder"):
        assert rule_for(config, f"{tower}.layers.1.self_attn.q_proj") is None
        assert rule_for(config, f"{tower}.layers.1.self_attn.qkv_proj") is None


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt, named", [
    ("int2_sym_g32", r"got 2; quantize it as int4_sym_g32"),
    ("int3_g16", r"got 3; quantize it as int4_g16"),
    ("int6_sym_row", r"got 6; quantize it as int8_sym_row"),
    ("int4_g32", r"zero points.*int4_sym_g32.*--allow asymmetric"),
    ("int4_sym_g8", r"groups of 16, 32.*got 8; quantize it as int4_sym_g16"),
    ("int8_sym_row_f32", r"scales in float16.*scale_dtype=float16"),
])
def test_formats_that_are_refused(fmt, named, quantized, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(FormatError, match=rf"{name}: gptq .*{named}"):
        to_gptq(quantized("llama", {name: fmt}, **FORMATS), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_scales_of_another_dtype_that_fit_are_taken(quantized, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    folder = quantized("llama", {name: "int4_sym_g32_bf16"}, **FORMATS)
    to_gptq(folder, tmp_path / "out")
    scale = open_stored(folder).read(name).segments[0].params["scale"]
    assert scale.dtype == torch.bfloat16
    assert torch.equal(tensors_of(tmp_path / "out")[f"{name}.scales"].T.float(), scale.float())


@pytest.mark.parametrize("shape, named", [
    ({"intermediate_size": 104}, r"mlp\.gate_proj: .*multiples of 32, got N = 104"),
    ({"hidden_size": 80, "head_dim": 32}, r"q_proj: .*multiples of 32, got K = 80"),
])
def test_shapes_that_are_refused(shape, named, quantized, tmp_path):
    source = save_tiny_model(tmp_path / "model", "llama", **shape)
    folder = quantized(source, format__group_size="row", **SYMMETRIC)
    with pytest.raises(FormatError, match=named):
        to_gptq(folder, tmp_path / "out")
    assert fewbits.load(folder) is not None and not (tmp_path / "out").exists()


def test_transposed_linears_and_embeddings_are_refused(quantized, tmp_path):
    with pytest.raises(FormatError, match=r"c_attn: gptq has no transposed linears"):
        to_gptq(quantized("gpt2", **FORMATS), tmp_path / "out")
    with pytest.raises(FormatError, match=r"embed_tokens: gptq has no packed embeddings"):
        to_gptq(quantized("llama", embeddings=True, **FORMATS), tmp_path / "out")

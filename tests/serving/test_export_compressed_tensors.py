"""compressed-tensors: its own unpacking gives our integers, and transformers without fewbits gives our logits."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.quant.errors import FormatError
from fewbits.quant.types import QuantizedTensor
from fewbits.serving.export import export
from fewbits.serving.export.stored import open_stored
from tests.serving.conftest import logits
from tests.serving.exporting import SHAPES, SYMMETRIC, config_of, every_format, local, tensors_of
from tests.vision import save_llava

pytest.importorskip("compressed_tensors")
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.utils.match import is_match

RELEASE = tuple(int(n) for n in version("compressed-tensors").split(".")[:2])
BITS = range(2, 9) if RELEASE >= (0, 18) else (2, 4, 8)

# transformers multiplies the codes of experts by their scales in float16, one rounding of 2^-11 a weight.
EXPERTS = 1e-3


def to_compressed_tensors(folder: Path, out: Path, *allow: str) -> Path:
    export(folder, out, to="compressed-tensors", allow=allow)
    return out


def assert_same_logits(found: dict, folder: Path, tolerance: float = 0.0) -> None:
    """Relative to the largest logit. For dense models it is exactly 0: the same float32 products, in the same order."""
    expected = logits(fewbits.load(folder, dequantize=True))
    assert (found["logits"] - expected).abs().max() <= tolerance * expected.abs().max()


def groups_by_name(config: dict, names: list[str]) -> dict[str, list[dict]]:
    """Module -> the groups that match it, by the library's own matching."""
    QuantizationConfig.model_validate(config)
    module = torch.nn.Linear(1, 1)
    return {n: [g for g in config["config_groups"].values() if is_match(n, module, g["targets"])] for n in names}


def assert_same_integers(tensors: dict, ours: QuantizedTensor) -> None:
    """The library's own unpacking against our codes, zero points and scales."""
    (segment,) = ours.segments
    bits, half = segment.format.code_bits, 1 << segment.format.code_bits - 1
    shape = torch.Size(tensors["weight_shape"].tolist())
    assert shape == ours.shape
    codes = unpack_from_int32(tensors["weight_packed"], bits, shape).int() + half
    assert torch.equal(codes, segment.codes.int())
    assert torch.equal(tensors["weight_scale"], segment.params["scale"])
    assert ("weight_zero_point" in tensors) == (not segment.format.symmetric)
    if not segment.format.symmetric:
        zero = unpack_from_int32(tensors["weight_zero_point"], bits, segment.params["scale"].shape, packed_dim=0)
        assert torch.equal(zero.int() + half, segment.params["zero_point"].int())


# -- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_every_format_unpacks_to_our_integers(shape, quantized, tmp_path):
    source, formats = every_format(tmp_path / "model", SHAPES[shape], BITS, (False, True))
    folder = quantized(source, formats)
    out = to_compressed_tensors(folder, tmp_path / "out", "odd-bits", "asymmetric")
    stored, tensors = open_stored(folder), tensors_of(out)
    matched = groups_by_name(config_of(out)["quantization_config"], list(formats))
    assert set(stored.matrices) == set(formats)
    for name, fmt in formats.items():
        ours = stored.read(name)
        assert ours.segments[0].format.name == fmt
        assert_same_integers(local(tensors, name), ours)
        (group,) = matched[name]
        weights = group["weights"]
        assert f"int{weights['num_bits']}{'_sym' if weights['symmetric'] else ''}_" == fmt.rpartition("_")[0] + "_"
        assert ours.segments[0].format.groups(ours.shape[1]) == (
            ours.shape[1] // weights["group_size"] if weights["strategy"] == "group" else 1)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_symmetric_format_loads(shape, quantized, reader, tmp_path):
    source, formats = every_format(tmp_path / "model", SHAPES[shape], BITS, (True,))
    folder = quantized(source, formats)
    found = reader.load(to_compressed_tensors(folder, tmp_path / "out", "odd-bits"))
    assert_same_logits(found, folder)
    stored = open_stored(folder)
    for name in formats:
        assert torch.equal(found["tensors"][f"{name}.weight"], stored.read(name).dequantize()), name


def test_dense_tensors_are_those_of_the_checkpoint(quantized, tmp_path):
    folder = quantized("llama", **SYMMETRIC)
    tensors, stored = tensors_of(to_compressed_tensors(folder, tmp_path / "out")), open_stored(folder)
    assert stored.dense_names
    for name in stored.dense_names:
        assert torch.equal(tensors[name], stored.dense(name)) and tensors[name].dtype == stored.dense(name).dtype
    assert set(tensors) == {*stored.dense_names, *(f"{n}.{k}" for n in stored.matrices
                                                   for k in ("weight_packed", "weight_scale", "weight_shape"))}


# -- models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "mistral", "gemma", "phi", "opt"])
def test_families_load(family, quantized, reader, tmp_path):
    folder = quantized(family, **SYMMETRIC)
    out = to_compressed_tensors(folder, tmp_path / "out")
    assert_same_logits(reader.load(out), folder)
    assert "lm_head" in config_of(out)["quantization_config"]["ignore"]
    tied = family in ("llama-tied", "gemma", "opt")
    assert config_of(out).get("tie_word_embeddings", True) == tied
    assert ("lm_head.weight" in tensors_of(out)) == (not tied)


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_quantized_head(family, quantized, reader, tmp_path):
    folder = quantized(family, lm_head=True, **SYMMETRIC)
    out = to_compressed_tensors(folder, tmp_path / "out")
    assert "lm_head.weight_packed" in tensors_of(out)
    assert config_of(out)["tie_word_embeddings"] is False, "engines that tie them would not look for its codes"
    found = reader.load(out)
    assert_same_logits(found, folder)
    assert torch.equal(found["tensors"]["lm_head.weight"], open_stored(folder).read("lm_head").dequantize())


def test_vision_language_model(quantized, reader, tmp_path):
    folder = quantized(save_llava(tmp_path / "model"), **SYMMETRIC)
    out = to_compressed_tensors(folder, tmp_path / "out")
    quantization, tensors = config_of(out)["quantization_config"], tensors_of(out)
    hub, path = "language_model.model.layers.0.mlp.up_proj", "model.language_model.layers.0.mlp.up_proj"
    assert f"{hub}.weight_packed" in tensors and f"{path}.weight_packed" not in tensors
    assert [len(found) for found in groups_by_name(quantization, [hub, path]).values()] == [1, 1]
    assert {"language_model.lm_head", "lm_head", "multi_modal_projector.linear_1"} < set(quantization["ignore"])
    assert_same_logits(reader.load(out, model="AutoModelForImageTextToText"), folder)


def test_mixture_loads_exactly_and_dequantize_does_not(quantized, reader, tmp_path):
    formats = {"*.self_attn.*": "int8_sym_row", "*.down_proj": "int2_sym_g16", "*.0.mlp.*": "int4_sym_g16"}
    folder = quantized("llama", formats, **SYMMETRIC)
    report = export(folder, tmp_path / "out", to="compressed-tensors")
    assert any("dequantize=True" in w for w in report.warnings)
    assert_same_logits(reader.load(tmp_path / "out"), folder)
    # What the report warns of. Should this loader learn to tell groups apart, the warning can go.
    with pytest.raises(AssertionError):
        assert_same_logits(reader.load(tmp_path / "out", dequantize=True), folder, tolerance=0.1)


def test_asymmetric_is_not_loaded_by_transformers(quantized, reader, tmp_path):
    folder = quantized("llama", format__group_size=32)
    with pytest.raises(FormatError, match=r"layers\.0.*zero points.*int4_sym_g32.*--allow asymmetric"):
        to_compressed_tensors(folder, tmp_path / "out")
    out = to_compressed_tensors(folder, tmp_path / "out", "asymmetric")
    if RELEASE >= (0, 18):  # should a later one load it, the refusal can go
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            reader.load(out)
    # decoded while loading, in float16: a rounding of 2^-11 a weight
    assert_same_logits(reader.load(out, dequantize=True), folder, tolerance=2e-3)


# -- experts ----------------------------------------------------------------------------------------------------------

EXPERTS_4 = {"format__group_size": 32, **SYMMETRIC}


@pytest.mark.parametrize("attention", ["int2_sym_g32", "int4_sym_g32", "int8_sym_row", "keep"])
def test_experts_and_attention(attention, quantized, reader, tmp_path):
    folder = quantized("qwen3-moe", {"*.self_attn.*": attention}, **EXPERTS_4)
    out = to_compressed_tensors(folder, tmp_path / "out")
    assert_same_logits(reader.load(out), folder, EXPERTS)
    # one format of linears and one of experts: also right when decoded while loading, each weight rounded to float16
    assert_same_logits(reader.load(out, dequantize=True), folder, 2e-3)


def test_experts_under_their_names_on_the_hub(quantized, tmp_path):
    folder = quantized("qwen3-moe", {"*.self_attn.*": "int8_sym_row"}, **EXPERTS_4)
    out = to_compressed_tensors(folder, tmp_path / "out")
    stored, tensors = open_stored(folder), tensors_of(out)
    names = []
    for layer in range(2):
        for expert in range(4):
            at = f"model.layers.{layer}.mlp.experts"
            gate_up, down = (stored.read(f"{at}.{p}.{expert}") for p in ("gate_up_proj", "down_proj"))
            parts = {"gate_proj": gate_up.rows(slice(0, 32)), "up_proj": gate_up.rows(slice(32, 64)), "down_proj": down}
            for projection, ours in parts.items():
                names.append(f"{at}.{expert}.{projection}")
                assert_same_integers(local(tensors, names[-1]), ours)
    matched = groups_by_name(config_of(out)["quantization_config"], names)
    assert {len(g) for g in matched.values()} == {1} and {g[0]["weights"]["num_bits"] for g in matched.values()} == {4}


def test_experts_of_groups_that_are_whole_rows(quantized, reader, tmp_path):
    """K of 64 and of 32 with groups of 64 and 32: rows in both, so one format."""
    formats = {"*gate_up_proj*": "int4_sym_g64", "*down_proj*": "int4_sym_row"}
    folder = quantized("qwen3-moe", formats, **SYMMETRIC)
    assert_same_logits(reader.load(to_compressed_tensors(folder, tmp_path / "out")), folder, EXPERTS)


@pytest.mark.parametrize("formats, named", [
    ({"*layers.1*experts*": "int8_sym_g32"}, r"layers\.1\.mlp\.experts\.gate_up_proj\.0: .*int8_sym_g32.*int4_sym_g32"),
    ({"*experts.gate_up_proj*": "int4_sym_g16"}, r"layers\.0\.mlp\.experts\.down_proj\.0: .*e\.g\. as int4_sym_g16"),
    ({"*experts.down_proj.2": "int8_sym_g16"}, r"layers\.0\.mlp\.experts\.down_proj\.2: .*e\.g\. as int8_sym_g16"),
    ({"*layers.1*experts*": "keep"}, r"layers\.1\.mlp\.experts\.0\.\w+_proj: .*12 tensors.*--allow dense-experts"),
])
def test_experts_of_several_formats_are_refused(formats, named, quantized, tmp_path):
    folder = quantized("qwen3-moe", formats, **EXPERTS_4)
    with pytest.raises(FormatError, match=named):
        to_compressed_tensors(folder, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_kept_experts(quantized, reader, tmp_path):
    folder = quantized("qwen3-moe", {"*experts*": "keep"}, **EXPERTS_4)
    out = to_compressed_tensors(folder, tmp_path / "out", "dense-experts")
    expert = open_stored(folder).dense("model.layers.0.mlp.experts.gate_up_proj")[2]
    assert torch.equal(tensors_of(out)["model.layers.0.mlp.experts.2.up_proj.weight"], expert[32:])
    ignored = config_of(out)["quantization_config"]["ignore"]
    assert is_match("model.layers.1.mlp.experts.3.down_proj", torch.nn.Linear(1, 1), ignored)
    assert "model.layers.1.mlp.gate" in ignored, "a router is a linear to other engines"
    with pytest.raises(RuntimeError, match="conversion of the weights"):  # should it load them, the refusal can go
        reader.load(out)


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt, named", [
    ("int1_sym_g32", r"1-bit.*int2_sym_g32"),
    ("int3_sym_g32", r"3 bits.*int4_sym_g32.*--allow odd-bits"),
    ("int5_sym_row", r"5 bits.*int8_sym_row.*--allow odd-bits"),
])
def test_bits_that_are_refused(fmt, named, quantized, tmp_path):
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(FormatError, match=rf"{name}: compressed-tensors .*{named}"):
        to_compressed_tensors(quantized("llama", {name: fmt}, **SYMMETRIC), tmp_path / "out")


def test_transposed_linears_are_refused(quantized, tmp_path):
    with pytest.raises(FormatError, match=r"transformer\.h\.0\.attn\.c_attn.*Conv1D.*8 of 8"):
        to_compressed_tensors(quantized("gpt2", **SYMMETRIC), tmp_path / "out")


def test_embeddings_are_refused(quantized, tmp_path):
    with pytest.raises(FormatError, match=r"model\.embed_tokens: .*embeddings=true"):
        to_compressed_tensors(quantized("llama", embeddings=True, **SYMMETRIC), tmp_path / "out")

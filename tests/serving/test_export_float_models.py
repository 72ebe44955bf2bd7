"""Whole models in 4-bit floats and ternary formats, exported and read by transformers, gguf and compressed-tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.quant.allocate.menu import ENGINES
from fewbits.quant.errors import FormatError, RecipeError
from fewbits.quant.formats import parse_format
from fewbits.quant.targets import Target
from fewbits.quant.types import Layout
from fewbits.serving.doctor import diagnose
from fewbits.serving.export import export
from fewbits.serving.export.bitnet import BitNet
from fewbits.serving.export.stored import open_stored
from tests.conftest import save_tiny_model
from tests.serving.conftest import logits
from tests.serving.exporting import config_of, local, tensors_of


def given(name: str, *more: str) -> dict[str, object]:
    return {"rules": [{"match": match, "format": name} for match in ("*_proj", *more)]}


def made_of(folder: Path, name: str, family: str = "llama", *more: str, **model: object) -> Path:
    save_tiny_model(folder / "dense", family, **model)
    fewbits.quantize(folder / "dense", folder / "ours", recipe="rtn", overrides=given(name, *more))
    return folder / "ours"


@pytest.mark.parametrize(("name", "allow"), [("mxfp4", []), ("ternary_g256", []), ("ternary_row", ["ternary"])])
def test_transformers_computes_the_same_from_a_gguf(name: str, allow: list[str], tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    sizes = {"hidden_size": 256, "intermediate_size": 256}
    ours = made_of(tmp_path, name, "llama", "lm_head", **sizes)
    export(ours, tmp_path / "m.gguf", to="gguf", allow=allow)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    want = logits(fewbits.load(ours, dequantize=True))
    assert float((logits(read) - want).abs().max()) < 1e-5 and float(want.std()) > 0.1
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    kinds = {t.tensor_type.name for t in reader.tensors} - {"F32"}
    assert kinds == {"MXFP4" if name == "mxfp4" else "TQ1_0" if allow else "TQ2_0"}
    assert reader.fields["general.file_type"].contents() == {"MXFP4": 38, "TQ1_0": 36, "TQ2_0": 37}[kinds.pop()]


def test_nvfp4_of_a_gguf_has_its_scales_beside_it(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    ours = made_of(tmp_path, "nvfp4", "llama", "lm_head", intermediate_size=128)
    export(ours, tmp_path / "m.gguf", to="gguf")
    reader, stored = gguf.GGUFReader(tmp_path / "m.gguf"), open_stored(ours)
    found = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    names = {f"model.layers.{i}.{theirs}": f"blk.{i}.{name}" for i in range(2) for theirs, name in
             (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down"))} | {"lm_head": "output"}
    for name, theirs in names.items():
        whole = stored.dense(f"{name}.weight_global_scale")
        assert found[f"{theirs}.scale"].tolist() == (1 / whole).tolist()
        values = found[f"{theirs}.weight"] * found[f"{theirs}.scale"]
        torch.testing.assert_close(torch.from_numpy(values), stored.read(name).dequantize(), rtol=2**-22, atol=0)
    assert sum(name.endswith(".scale") for name in found) == len(stored.matrices) == 15
    assert reader.fields["general.file_type"].contents() == 39


def test_a_gguf_package_that_is_too_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = pytest.importorskip("gguf")
    ours = made_of(tmp_path, "mxfp4")
    known = {k: v for k, v in gguf.GGMLQuantizationType.__members__.items() if k != "MXFP4"}
    monkeypatch.setattr(gguf, "GGMLQuantizationType", type("Old", (), {"__members__": known}))
    with pytest.raises(RecipeError, match="gguf knows no MXFP4; pip install --upgrade gguf"):
        export(ours, tmp_path / "m.gguf", to="gguf")


@pytest.mark.parametrize(("name", "family"), [("mxfp4", "llama"), ("nvfp4", "llama"), ("ternary_g32", "llama"),
                                              ("ternary_row_b3", "llama"), ("mxfp4", "qwen3-moe")])
def test_transformers_computes_the_same_from_compressed_tensors(name: str, family: str, reader, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    ours = made_of(tmp_path, name, family, "*experts*")
    report = export(ours, tmp_path / "out", to="compressed-tensors")
    assert any("load it with dtype=torch.bfloat16" in w for w in report.warnings) == ("fp4" in name)
    dtype = torch.bfloat16 if "fp4" in name else torch.float32
    found = reader.load(tmp_path / "out", dtype=str(dtype).removeprefix("torch."))
    want = logits(fewbits.load(ours, dequantize=True, dtype=dtype))
    assert torch.equal(found["logits"].float(), want) and float(want.std()) > 0.1
    stored = open_stored(ours)
    for matrix, (target, _) in stored.matrices.items():
        if target.kind == "linear":
            assert torch.equal(found["tensors"][f"{matrix}.weight"], stored.read(matrix).dequantize().to(dtype)), matrix


def test_floats_beside_integers(reader, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    save_tiny_model(tmp_path / "dense", "llama")
    rules = [{"match": match, "format": name} for match, name in (
        ("*.self_attn.*", "int8_sym_row"), ("*.gate_proj", "mxfp4"), ("*.up_proj", "nvfp4"),
        ("*.down_proj", "ternary_g32"))]
    fewbits.quantize(tmp_path / "dense", tmp_path / "ours", recipe="rtn", overrides={"rules": rules})
    report = export(tmp_path / "ours", tmp_path / "out", to="compressed-tensors")
    assert len(report.warnings) == 2 and "several formats" in report.warnings[0]
    config = config_of(tmp_path / "out")["quantization_config"]
    assert config["format"] == "mixed-precision"
    QuantizationConfig.model_validate(config)
    kinds = {g["format"] for g in config["config_groups"].values()}
    assert kinds == {"pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"}
    found, stored = reader.load(tmp_path / "out", dtype="bfloat16"), open_stored(tmp_path / "ours")
    for name in stored.matrices:
        theirs, ours = found["tensors"][f"{name}.weight"].float(), stored.read(name).dequantize()
        if name.endswith(("gate_proj", "up_proj")):
            assert torch.equal(theirs, ours.bfloat16().float()), name
        else:  # it casts scales of integers to bfloat16 before it multiplies
            torch.testing.assert_close(theirs, ours, rtol=2**-7, atol=0)


def test_nvfp4_linears_that_vllm_runs_as_one_are_warned_of(tmp_path: Path) -> None:
    ours = made_of(tmp_path, "nvfp4")
    report = export(ours, tmp_path / "out", to="compressed-tensors")
    assert len(report.warnings) == 2 and report.warnings[1].startswith("model.layers.0.self_attn.q_proj: nvfp4 has one")
    assert "(4 groups of linears are like it)" in report.warnings[1]
    layout = Layout.of(parse_format("nvfp4"), 64)
    assert not ENGINES["vllm"].reads(layout) and ENGINES["transformers"].reads(layout)
    assert ENGINES["vllm"].reads(Layout.of(parse_format("mxfp4"), 64))
    assert not ENGINES["sglang"].reads(Layout.of(parse_format("mxfp4"), 64))


@pytest.mark.parametrize(("name", "readers"), [
    ("mxfp4", {"transformers", "vLLM", "llama.cpp"}),
    ("nvfp4", {"transformers"}),  # 96 columns are not whole blocks of llama.cpp
    ("ternary_g32", {"transformers", "vLLM"}), ("ternary_mean_g32", set()), ("nf4_g32", set()),
])
def test_the_doctor_knows_who_reads_them(name: str, readers: set[str], tmp_path: Path) -> None:
    engines = diagnose(made_of(tmp_path, name)).engines
    assert {v.engine.split(" with ")[0] for v in engines if v.reads == "after export"} == readers
    if name == "mxfp4":
        vllm = next(v for v in engines if v.engine == "vLLM")
        assert "Marlin" in vllm.kernel and vllm.tensor_parallel == [1]  # K of 64 and 96: two ranks have no whole groups


def test_experts_in_nvfp4_are_refused(reader, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    ours = made_of(tmp_path, "nvfp4", "qwen3-moe", "*experts*")
    with pytest.raises(FormatError, match=r"experts\.gate_up_proj\.0: .*experts in nvfp4.*mxfp4, or --allow nvfp4-exp"):
        export(ours, tmp_path / "out", to="compressed-tensors")
    export(ours, tmp_path / "out", to="compressed-tensors", allow=["nvfp4-experts"])
    expert = open_stored(ours).read("model.layers.0.mlp.experts.gate_up_proj.1")
    up = local(tensors_of(tmp_path / "out"), "model.layers.0.mlp.experts.1.up_proj")
    assert torch.equal(up["weight_global_scale"], expert.pack()["weight_global_scale"])
    assert torch.equal(up["weight_packed"], expert.pack()["weight_packed"].view(torch.uint8)[32:])
    found = reader.load(tmp_path / "out", dtype="bfloat16")["tensors"]["model.layers.0.mlp.experts.gate_up_proj"]
    assert not torch.equal(found[1], expert.dequantize().bfloat16())  # should it, the refusal can go


# -- ternary to BitNet ----------------------------------------------------------------------------------------------


def ternary_model(folder: Path, name: str, *, scales: int = 1) -> Path:
    """A model whose linears are -1, 0 and 1 under ``scales`` scales a matrix, quantized."""
    save_tiny_model(folder / "first", "llama")
    model = AutoModelForCausalLM.from_pretrained(folder / "first", dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.endswith("_proj"):
                values = torch.randint(-1, 2, module.weight.shape, generator=draw).float()
                values[5] = 0
                scale = 0.0625 * (1 + torch.arange(len(values)) % scales)
                module.weight.copy_(values * scale[:, None])
    model.save_pretrained(folder / "dense")
    fewbits.quantize(folder / "dense", folder / "ours", recipe="rtn", overrides=given(name))
    return folder / "ours"


@pytest.mark.parametrize("name", ["ternary_row", "ternary_g32", "ternary_row_b3"])
def test_ternary_weights_of_one_scale_go_to_bitnet(name: str, reader, tmp_path: Path) -> None:
    ours = ternary_model(tmp_path, name)
    export(ours, tmp_path / "out", to="bitnet")
    found, stored = reader.load(tmp_path / "out"), open_stored(ours)
    for matrix in stored.matrices:
        packed, inverse = (found["tensors"][f"{matrix}.{leaf}"] for leaf in ("weight", "weight_scale"))
        values = torch.cat([(packed >> 2 * i & 3).float() - 1 for i in range(4)])
        assert torch.equal(values / inverse, stored.read(matrix).dequantize()) and inverse.tolist() == [16]
        assert not values[5].any()


def test_ternary_weights_of_several_scales_are_refused_by_bitnet(tmp_path: Path) -> None:
    ours = ternary_model(tmp_path, "ternary_row", scales=3)
    with pytest.raises(FormatError, match=r"q_proj: bitnet takes one scale a matrix, got 0\.0625 to 0\.1875;"):
        export(ours, tmp_path / "out", to="bitnet")
    target = Target("a.b", "a.b", "linear", "weight", None, (4, 64))
    layout = Layout.of(parse_format("ternary_mean_row"), 64)
    assert "takes integers alone; got ternary_mean_row" in str(BitNet().obstacle(target, layout))

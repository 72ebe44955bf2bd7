"""A plain model: transformers loads the values that the codes mean, and it can be quantized again."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.cli.main import main
from fewbits.quant.formats import parse_layout
from fewbits.serving.export import export
from fewbits.serving.export.stored import open_stored
from tests.conftest import FAMILIES, save_tiny_model
from tests.serving.conftest import logits, round_to_nearest
from tests.serving.exporting import tensors_of, write_checkpoint


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_the_dequantized_model(family, quantized, tmp_path):
    folder = quantized(family, format__group_size=16, embeddings=family == "gemma")
    dense = fewbits.load(folder, dequantize=True)
    export(folder, tmp_path / "out", to="dense")
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and not hasattr(model.config, "quantization_config")
    for name, value in dense.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    assert torch.equal(logits(model.eval()), logits(dense))


@pytest.mark.parametrize("layout", ["had:int2_g32", "lr4:int2_g32", "perm:scl:int4_g16[64]+binary_row[192]", "vq8_v4",
                                    "trellis2", "fdb_g32", "nvfp4"])
def test_any_layout(layout, tmp_path):
    source, name = save_tiny_model(tmp_path / "model", "llama", hidden_size=256), "model.layers.0.mlp.up_proj"
    weight = load_file(source / "model.safetensors")[f"{name}.weight"]
    made = round_to_nearest(weight, parse_layout(layout, 256))
    folder = write_checkpoint(source, tmp_path / "quantized", {name: made})
    export(folder, tmp_path / "out", to="dense")
    assert torch.equal(tensors_of(tmp_path / "out")[f"{name}.weight"], made.dequantize())


def test_floats_are_of_the_originals_type(tmp_path):
    source = save_tiny_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    fewbits.quantize(source, tmp_path / "q", recipe="rtn", overrides={"format.group_size": 32})
    report = export(tmp_path / "q", tmp_path / "out", to="dense")
    assert "rounded to bfloat16" in report.warnings[0]
    found = tensors_of(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(found[f"{name}.weight"], open_stored(tmp_path / "q").read(name).dequantize().bfloat16())


def test_it_can_be_quantized_again(quantized, tmp_path):
    """Codes on the same grid are found again: a second rounding changes nothing."""
    folder = quantized("llama", format__group_size=32, format__symmetric=True)
    assert main(["export", str(folder), "--to", "dense", "-o", str(tmp_path / "plain")]) == 0
    assert "rounded to codes of" in (tmp_path / "plain" / "README.md").read_text()
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    again = fewbits.quantize(tmp_path / "plain", tmp_path / "again", recipe="rtn", overrides={"format.bits": 8})
    assert again.bits_per_weight > 8
    one, other = logits(fewbits.load(folder)), logits(fewbits.load(tmp_path / "again"))
    assert float((one - other).abs().max()) < 0.05 * float(one.abs().max())

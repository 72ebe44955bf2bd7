"""Checkpoints of formats of few levels and of tables: loaded, saved, inspected and judged like those of integers."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from fewbits.kernels.linear import PackedMatrix, QuantEmbedding, TiedHead
from fewbits.quant.allocate.menu import _sorted_layout
from fewbits.quant.errors import FormatError
from fewbits.quant.formats import layout_name, parse_format
from fewbits.quant.inspection import inspect
from fewbits.serving.doctor import diagnose
from fewbits.serving.transformers import load
from tests.serving.conftest import logits, same_bytes, stored_tensors

TOLERANCE = 2e-4  # as in test_loading.py
NAMES = ["ternary_g32", "ternary_mean_row_b3", "binary_g16", "binary2_mean_g32", "binary3_row", "binary4_g32",
         "fdb_g16", "seq_g32", "nf4_g32", "fp3_row", "fp4_g16", "fpq4_g32", "bitmod3_g32", "bitmod4_g16",
         "nupes3_g32", "nupes4_row", "mxfp4", "nvfp4"]


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_dequantized_model(name, checkpoint, tiny):
    folder, dense = checkpoint("llama-tied", default=name, exceptions={"model.embed_tokens": name})
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert isinstance(model.get_output_embeddings(), TiedHead)
    for length in (1, 12):  # one token and many take different kernels
        torch.testing.assert_close(logits(model, length), logits(dense, length), rtol=0, atol=TOLERANCE)
    original = AutoModelForCausalLM.from_pretrained(tiny("llama-tied"))
    assert (logits(model) - logits(original)).abs().max() > 0.1, "the test cannot tell quantized from original"


@pytest.mark.parametrize("name", ["ternary_mean_row_b3", "bitmod3_g32", "nvfp4"])
def test_saving_again_writes_the_same(name, checkpoint, tmp_path):
    folder, _ = checkpoint("llama-tied", default=name, exceptions={"model.embed_tokens": name})
    model = load(folder).to(torch.bfloat16)
    assert logits(model).isfinite().all()
    model.save_pretrained(tmp_path)
    before, after = ({k: v for k, v in stored_tensors(f).items() if ".weight_" in k} for f in (folder, tmp_path))
    assert before and same_bytes(before, after)


def test_a_model_of_many_formats_is_inspected_and_judged(quantized, tiny):
    """Through the pipeline: every linear has another format."""
    from fewbits.quant.targets import find_targets

    model = AutoModelForCausalLM.from_pretrained(tiny("llama"))
    targets = [t.name for t in find_targets(model) if t.kind == "linear" and t.name != "lm_head"]
    formats = dict(zip(targets, [*NAMES, *NAMES]))
    folder = quantized("llama", formats=formats)
    found = {t["name"]: t["format"] for t in inspect(folder).tensors}
    assert {name: found[name] for name in formats} == formats
    kernels = next(e for e in diagnose(folder).to_json()["engines"] if e["engine"] == "transformers with fewbits")
    assert "triton_group_gemv" in kernels["kernel"]
    loaded = load(folder)
    assert {m.layout.runs[0][0].name for m in loaded.modules() if isinstance(m, PackedMatrix)} >= set(formats.values())
    before = logits(loaded)
    loaded.dequantize()
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name, expected", [
    ("nf4_row", "perm:nf4_g32[64]+nf4_g8[8]"), ("ternary_g16", "perm:ternary_g16[64]+ternary_g8[8]"),
    ("int4_g16", "perm:int4_g16[64]+int4_g8[8]"),
])
def test_sorted_columns_of_groups(name, expected):
    assert layout_name(_sorted_layout(parse_format(name), 72, 32)) == expected


def test_sorted_columns_keep_a_size_that_is_fixed():
    assert layout_name(_sorted_layout(parse_format("nvfp4"), 80, 32)) == "perm:nvfp4"
    with pytest.raises(FormatError, match="K = 8 is not a multiple of group_size 16"):
        _sorted_layout(parse_format("nvfp4"), 72, 32)

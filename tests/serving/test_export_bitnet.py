"""BitNet: transformers' own loader gives our integers, and the logits of ternary weights and 8-bit activations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import fewbits
from fewbits.quant.errors import FormatError
from fewbits.quant.formats import parse_format
from fewbits.quant.targets import find_targets
from fewbits.quant.types import QuantizedTensor, Segment
from fewbits.serving.export import export
from fewbits.serving.export.stored import open_stored
from tests.serving.conftest import logits
from tests.serving.exporting import SYMMETRIC, config_of, local, tensors_of, write_checkpoint

# Sums of at most 96 float32 products, two blocks deep, in another order; and, where a sum falls on the border between
# two of the 256 levels of an activation, one level in one linear.
TOLERANCE = 1e-4


def ternary(shape: tuple[int, int], seed: int, fmt: str) -> QuantizedTensor:
    """Random values -1, 0 and 1 under one scale."""
    draw, form = torch.Generator().manual_seed(seed), parse_format(fmt)
    codes = torch.randint(1, 4, shape, generator=draw, dtype=torch.uint8)
    scale = 0.05 + 0.1 * float(torch.rand((), generator=draw))
    scales = torch.full((shape[0], form.groups(shape[1])), scale, dtype=torch.float16)
    return QuantizedTensor(shape, (Segment(form, codes, {"scale": scales}),))


def ternary_checkpoint(
    source: Path, out: Path, keep: tuple[str, ...] = ("lm_head",), fmt: str = "int2_sym_row"
) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source)
    linears = [t for t in find_targets(model) if t.kind == "linear" and t.name not in keep]
    return write_checkpoint(source, out, {t.name: ternary(t.shape, i, fmt) for i, t in enumerate(linears)})


def unpacked(weight: Tensor) -> Tensor:
    """Values ``(N, K)`` by the definition of the layout."""
    return torch.cat([(weight >> 2 * i & 3).to(torch.int8) - 1 for i in range(4)])


def with_8_bit_activations(model: nn.Module, kept: set[str]) -> nn.Module:
    """Each linear but the kept ones rounds its input to 255 levels between plus and minus its largest value."""
    def round_input(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        scale = 127 / args[0].abs().amax(-1, keepdim=True).clamp(min=1e-5)
        return ((args[0] * scale).round().clamp(-128, 127) / scale,)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in kept:
            module.register_forward_pre_hook(round_input)
    return model


@pytest.mark.parametrize("family, keep, fmt", [
    ("llama", ("lm_head",), "int2_sym_row"),
    ("llama", ("lm_head", "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"), "int2_sym_g16"),
    ("llama-tied", ("lm_head",), "int2_sym_g32"),
    ("llama", (), "int2_sym_row"),  # the head too
    ("phi", ("lm_head",), "int2_sym_row"),  # with biases
])
def test_loads(family, keep, fmt, tiny, reader, tmp_path):
    folder = ternary_checkpoint(tiny(family), tmp_path / "model", keep, fmt)
    report = export(folder, tmp_path / "out", to="bitnet")
    assert len(report.warnings) == 1 and "8 bits a token" in report.warnings[0]
    found, stored, tensors = reader.load(tmp_path / "out"), open_stored(folder), tensors_of(tmp_path / "out")
    for name in stored.matrices:
        segment = stored.read(name).segments[0]
        assert found["classes"][name] == "BitLinear"
        theirs = found["tensors"][f"{name}.weight"]
        assert torch.equal(theirs, tensors[f"{name}.weight"]), "the loader changed the packed weight"
        assert torch.equal(unpacked(theirs), segment.codes.to(torch.int8) - 2)
        assert torch.equal(found["tensors"][f"{name}.weight_scale"], 1 / segment.params["scale"][0, :1].float())
    assert all(found["classes"][name] == "Linear" for name in keep)
    dense = fewbits.load(folder, dequantize=True)
    weights_only = logits(dense)
    expected = logits(with_8_bit_activations(dense, set(keep)))
    size = expected.abs().max()
    assert (found["logits"] - expected).abs().max() <= TOLERANCE * size
    assert (expected - weights_only).abs().max() > 10 * TOLERANCE * size, "the test cannot tell activations apart"


def test_its_own_unpacking(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    from transformers.integrations.bitnet import unpack_weights

    folder = ternary_checkpoint(tiny("llama"), tmp_path / "model")
    export(folder, tmp_path / "out", to="bitnet")
    stored, tensors = open_stored(folder), tensors_of(tmp_path / "out")
    for name in stored.matrices:
        with torch._dynamo.config.patch(disable=True):
            values = unpack_weights(tensors[f"{name}.weight"], torch.float32)
        assert torch.equal(values, stored.read(name).segments[0].codes.float() - 2)


def test_groups_of_zeros_have_no_scale(tiny, tmp_path):
    """Rounding stores 1 as their scale, whatever that of the others is."""
    folder = ternary_checkpoint(tiny("llama"), tmp_path / "model", fmt="int2_sym_g32")
    name = "model.layers.0.mlp.up_proj"
    model = {n: open_stored(folder).read(n) for n in open_stored(folder).matrices}
    segment = model[name].segments[0]
    segment.codes[3, :32] = 2
    segment.params["scale"][3, 0] = 1
    other = "model.layers.1.mlp.up_proj"
    model[other].segments[0].codes.fill_(2)
    export(write_checkpoint(tiny("llama"), tmp_path / "again", model), tmp_path / "out", to="bitnet")
    found = local(tensors_of(tmp_path / "out"), name)
    assert torch.equal(unpacked(found["weight"]), segment.codes.to(torch.int8) - 2)
    assert torch.equal(found["weight_scale"], 1 / segment.params["scale"][:1, 0].float())
    assert not unpacked(tensors_of(tmp_path / "out")[f"{other}.weight"]).any()


# -- refusals ---------------------------------------------------------------------------------------------------------


def refused(folder: Path, out: Path, match: str) -> None:
    with pytest.raises(FormatError, match=match):
        export(folder, out, to="bitnet")
    assert not out.exists() and not list(out.parent.glob(f".{out.name}-*")), "something half-written is left"


def test_values_and_scales_that_are_refused(tiny, tmp_path):
    folder = ternary_checkpoint(tiny("llama"), tmp_path / "model")
    model = {n: open_stored(folder).read(n) for n in open_stored(folder).matrices}
    name = "model.layers.1.self_attn.o_proj"
    segment = model[name].segments[0]
    segment.codes[5, 7] = 0
    refused(write_checkpoint(tiny("llama"), tmp_path / "minus-two", model), tmp_path / "out", rf"{name}: .*-2 in 0\.0%")
    segment.codes[5, 7] = 1
    segment.params["scale"][5] *= 1.01
    folder = write_checkpoint(tiny("llama"), tmp_path / "scales", model)
    refused(folder, tmp_path / "out", rf"{name}: .*one scale .*to ")


@pytest.mark.parametrize("fmt", ["int4_sym_g32", "int2_g32", "int3_sym_row"])
def test_formats_that_are_refused(fmt, quantized, tmp_path):
    refused(quantized("llama", {"*_proj": fmt}), tmp_path / "out", rf"q_proj: bitnet takes ternary.*{fmt}.*14 of 14")


def test_rounded_weights_are_refused(quantized, tmp_path):
    refused(quantized("llama", {"*_proj": "int2_sym_row"}), tmp_path / "out", "q_proj: bitnet takes")


def test_kinds_that_are_refused(quantized, tmp_path):
    refused(quantized("gpt2", format__bits=2, **SYMMETRIC), tmp_path / "out", "c_attn: bitnet has no transposed")
    refused(quantized("llama", {"*embed*": "int2_sym_row"}), tmp_path / "out", "embed_tokens: bitnet has no packed emb")
    refused(quantized("qwen3-moe", {"*experts*": "int2_sym_row", "*_proj": "keep"}), tmp_path / "out",
            "experts.gate_up_proj.0: bitnet has no experts")


def test_config_lists_what_stays_dense(tiny, tmp_path):
    keep = ("lm_head", "model.layers.0.mlp.up_proj")
    export(ternary_checkpoint(tiny("llama"), tmp_path / "model", keep), tmp_path / "out", to="bitnet")
    found = config_of(tmp_path / "out")["quantization_config"]
    assert json.loads(json.dumps(found)) == {
        "quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline",
        "modules_to_not_convert": sorted(keep),
    }

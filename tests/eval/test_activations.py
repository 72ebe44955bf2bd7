"""The simulation of rounded activations: what it rounds, and that it says so."""

from __future__ import annotations

import pytest
import torch

import fewbits
from fewbits.eval.activations import round_activations, rounder
from fewbits.eval.report import evaluate
from fewbits.eval.text import Text
from fewbits.kernels.linear import QuantLinear
from fewbits.quant.errors import FewbitsError, FormatError
from fewbits.quant.formats import parse_format

torch.set_num_threads(1)

TEXT = Text("some", "The quick brown fox jumps over the lazy dog. " * 20)


@pytest.fixture(scope="module", params=["fp4_g16", "had:int4_g16"])
def quantized(request, tmp_path_factory, tiny):
    out = tmp_path_factory.mktemp("activations") / "out"
    fewbits.quantize(tiny("llama"), out, recipe="rtn", overrides={"format.layout": request.param})
    return out


def test_every_token_by_itself() -> None:
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 50, 0.01])[:, None]
    for name in ("fp4_row", "int8_sym_row", "fpq4_g16", "mxfp4"):
        whole = rounder(parse_format(name))(x)
        assert whole.shape == x.shape and whole.dtype == x.dtype
        assert torch.equal(whole[1, 2], rounder(parse_format(name))(x[1, 2]))
        assert 0 < float((whole - x).norm() / x.norm()) < 0.2
        assert rounder(parse_format(name))(x.bfloat16()).dtype == torch.bfloat16


def test_a_linear_reads_rounded_inputs(quantized) -> None:
    model = fewbits.load(quantized)
    linear = next(m for m in model.modules() if isinstance(m, QuantLinear))
    x = torch.randn(5, linear.columns, generator=torch.Generator().manual_seed(1))
    before, own = linear(x), linear.dense().float()
    round_activations(model, "fp4_row")
    after = linear(x)
    assert not torch.equal(before, after)
    if not linear.layout.rotated:
        assert torch.allclose(after, rounder(parse_format("fp4_row"))(x) @ own.T, atol=1e-4)
    error = float((after - before).norm() / before.norm())
    assert 0.01 < error < 0.3


def test_the_report_says_so(quantized, tiny) -> None:
    def kl(name: str | None) -> float:
        report = evaluate(quantized, baseline=tiny("llama"), text=[TEXT], window=64, limit=2, activations=name)
        assert ("SIMULATION" in report.to_markdown()) == (name is not None)
        assert report.to_json()["protocol"].get("activations") == name
        assert report.total is not None and report.total.divergence is not None
        return report.total.divergence.kl_mean

    plain, eight, four = kl(None), kl("int8_sym_row"), kl("fp4_row")
    assert abs(eight - plain) < abs(four - plain) and four > plain


def test_mistakes(quantized, tiny) -> None:
    with pytest.raises(FormatError, match="did you mean"):
        evaluate(quantized, text=[TEXT], activations="fp4_raw")
    with pytest.raises(FormatError, match="codes several rows at once"):
        evaluate(quantized, text=[TEXT], activations="trellis2")
    with pytest.raises(FormatError, match="not a multiple of group_size 48"):
        evaluate(quantized, text=[TEXT], activations="fp4_g48")
    with pytest.raises(FewbitsError, match="no quantized linears"):
        evaluate(tiny("llama"), text=[TEXT], activations="fp4_row")
    with pytest.raises(FewbitsError, match="loaded already"):
        evaluate(fewbits.load(quantized), text=[TEXT], activations="fp4_row")

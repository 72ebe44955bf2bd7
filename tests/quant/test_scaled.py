"""Scaled weights: what the scales mean, how they are found, salient columns beside binary ones, and names."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

import fewbits
from fewbits.kernels.linear import QuantLinear
from fewbits.quant.errors import FormatError
from fewbits.quant.formats import layout_name, parse_layout, resolve_layout
from fewbits.quant.quantizers import GPTQ, RTN
from fewbits.quant.quantizers.fit import _refit_columns
from fewbits.quant.rotation import choose_scales
from fewbits.quant.types import LayerStats, QuantizedTensor, proxy_loss

torch.set_num_threads(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stats(columns: int, seed: int = 5) -> LayerStats:
    x = random(8 * columns, columns, seed=seed) * torch.linspace(0.2, 3, columns) + 0.5
    return LayerStats(x.T @ x, len(x))


# -- names and bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["scl:binary_row", "perm:scl:int4_g8[16]+binary_row[24]", "lr4:scl:ternary_g8",
                                  "scl:vq8_v4"])
def test_names_and_bytes(name: str) -> None:
    layout = parse_layout(name, 40)
    assert layout_name(layout) == name and layout.scaled and not layout.rotated and layout.whole
    made, _ = GPTQ().quantize(random(12, 40), stats(40), layout)
    stored = made.pack()
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == layout.storage(12)
    assert torch.equal(QuantizedTensor.unpack(stored, layout).dequantize(), made.dequantize())
    assert made.layout == layout
    assert layout.stored_bytes(12) - parse_layout(name.replace("scl:", ""), 40).stored_bytes(12) == 2 * (12 + 40)


def test_names_that_mean_nothing() -> None:
    for name in ("scl:trellis2", "scl:rvq2"):
        with pytest.raises(FormatError, match="scales of its own"):
            parse_layout(name, 64)
    for name in ("scl:had:int4_g8", "had:scl:int4_g8", "scl:perm:int4_g8"):
        with pytest.raises(FormatError):
            parse_layout(name, 64)


def test_a_rotation_needs_16_and_scales_do_not() -> None:
    parse_layout("scl:int4_row", 7).storage(3)
    with pytest.raises(FormatError, match="rotation"):
        parse_layout("had:int4_row", 7).storage(3)


@pytest.mark.parametrize("columns, name", [
    (576, "perm:scl:int4_g32[128]+binary_row[448]"), (1536, "perm:scl:int4_g32[320]+binary_row[1216]"),
    (64, "perm:scl:int4_g32[32]+binary_row[32]"),
])
def test_shares_of_columns(columns: int, name: str) -> None:
    layout = resolve_layout("perm:scl:int4_g32[20%]+binary_row", columns)
    assert layout_name(layout) == name and parse_layout(name, columns) == layout


def test_other_names_are_resolved() -> None:
    assert layout_name(resolve_layout("int4", 576)) == "int4_g64"
    assert layout_name(resolve_layout("nf4", 512)) == "nf4_g128"
    assert layout_name(resolve_layout("had:ternary_b3", 96)) == "had:ternary_g32_b3"
    assert layout_name(resolve_layout("int4_g8[16]+int2_g8[24]", 40)) == "int4_g8[16]+int2_g8[24]"
    for bad, message in (("int4_g32[20%]", "needed runs"), ("int4_g32[99%]+int2_row", "leaves nothing"),
                         ("int4_g32[x%]+int2_row", "shares"), ("int4_g32[20%]+int2_g7", "multiple of group_size 7")):
        with pytest.raises(FormatError, match=message):
            resolve_layout(bad, 64)


# -- scales ------------------------------------------------------------------------------------------------------------


def test_the_product_of_two_vectors_is_found() -> None:
    rows, columns = random(20, seed=1).exp(), random(30, seed=2).mul(0.3).exp()
    weight = rows[:, None] * columns * random(20, 30, seed=3).sign()
    basis = choose_scales(weight, None)
    assert torch.allclose(basis.out_scale.float()[:, None] * basis.in_scale.float(), weight.abs(), rtol=3e-3)
    made, _ = RTN().quantize(weight, None, parse_layout("scl:binary_row", 30))
    assert torch.allclose(made.dequantize(), weight, rtol=6e-3)


def test_what_scales_mean() -> None:
    """Multiplied out by hand: the codes see ``in_scale * x``, and ``out_scale`` follows."""
    made, _ = GPTQ(rescale=True).quantize(random(9, 24), stats(24), parse_layout("scl:binary_mean_row", 24))
    inner, basis = made.segments[0].dequantize(), made.rotation
    assert basis is not None
    x = random(5, 24, seed=8)
    by_hand = ((x * basis.in_scale.float()) @ inner.T) * basis.out_scale.float()
    assert torch.allclose(x @ made.dequantize().T, by_hand, atol=1e-5)


def test_column_scales_are_the_best_there_are() -> None:
    weight, seen = random(16, 12), stats(12)
    made, _ = RTN().quantize(weight, None, parse_layout("scl:binary_row", 12))
    better = _refit_columns(weight, made, seen)
    start, least = proxy_loss(weight, made, seen)[0], proxy_loss(weight, better, seen)[0]
    assert least < start
    basis, q = better.rotation, better.dequantize()
    assert basis is not None
    for column in range(12):  # no column's scale alone makes it better
        for factor in (0.95, 1.05):
            moved = q.clone()
            moved[:, column] *= factor
            assert proxy_loss(weight, moved, seen)[0] > least * 0.999


def test_signs_of_a_row_are_the_best_for_its_scales() -> None:
    """All signs of a row tried: with the scale least squares gives each, none is better than those of the weight."""
    w = random(1, 10)
    made, _ = RTN().quantize(w, None, parse_layout("binary_row", 10))
    signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=10)))
    best = (w.square().sum() - (signs @ w[0]).square() / 10).min()
    assert float((w - made.dequantize()).square().sum()) == pytest.approx(float(best), abs=1e-4)


# -- salient columns ---------------------------------------------------------------------------------------------------


def test_fine_columns_take_up_the_errors_of_coarse_ones() -> None:
    weight, seen = random(64, 96), stats(96)
    layout = parse_layout("perm:int4_g16[32]+binary_row[64]", 96)

    def loss(**options: bool) -> float:
        return proxy_loss(weight, GPTQ(**options).quantize(weight, seen, layout)[0], seen)[0]  # type: ignore[arg-type]

    assert loss(coarse_first=True) < 0.97 * loss()
    one = parse_layout("int4_g16", 96)
    a, b = (GPTQ(coarse_first=c).quantize(weight, seen, one)[0].dequantize() for c in (False, True))
    assert torch.equal(a, b)


def test_all_or_none_salient() -> None:
    """All columns salient is plain 4 bits, none is plain binary: nothing else happens to them."""
    weight, seen = random(16, 64), stats(64)
    for name in ("int4_g16", "binary_row"):
        plain, _ = GPTQ().quantize(weight, seen, parse_layout(name, 64))
        mixed, _ = GPTQ(coarse_first=True).quantize(weight, seen, parse_layout(name, 64))
        assert torch.equal(plain.dequantize(), mixed.dequantize())


def test_a_model_with_the_recipe_loads(tmp_path, tiny) -> None:
    out = tmp_path / "out"
    made = fewbits.quantize(tiny("llama"), out, recipe="ptq161", overrides={
        "calibration.samples": 4, "calibration.seqlen": 32, "format.layout": "perm:scl:int4_g8[20%]+binary_row"})
    assert made.bits_per_weight < 6
    model = fewbits.load(out)
    for module in model.modules():
        if isinstance(module, QuantLinear):
            assert module.layout.scaled and module.layout.permuted
            x = random(3, module.columns)
            dense = module.quantized().dequantize()
            assert torch.allclose(module(x), x @ dense.T + (0 if module.bias is None else module.bias), atol=1e-4)


# -- exponents folded --------------------------------------------------------------------------------------------------


def test_exponents_of_inputs_are_folded_into_weights() -> None:
    weight = random(16, 32) * 0.1
    x = random(512, 32, seed=4) * torch.where(torch.arange(32) % 8 == 0, 30.0, 1.0)
    seen = LayerStats(x.T @ x, len(x))
    made, _ = GPTQ(scales="inputs").quantize(weight, seen, parse_layout("scl:fp4_g16", 32))
    basis = made.rotation
    assert basis is not None
    shift = -basis.in_scale.float().log2()
    assert torch.equal(shift, torch.where(torch.arange(32) % 8 == 0, 3.0, 0.0))
    assert torch.allclose(made.dequantize(), weight, atol=0.1)
    # rounded with one scale a token, inputs lose less
    from fewbits.eval.activations import rounder
    from fewbits.quant.formats import parse_format

    run, y = rounder(parse_format("fp4_row")), x @ weight.T
    folded = run(x * basis.in_scale.float()) / basis.in_scale.float()
    assert float((folded @ weight.T - y).norm()) < 0.8 * float((run(x) @ weight.T - y).norm())

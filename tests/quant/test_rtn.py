"""Round to nearest: each weight goes to the nearest value of its group, and nothing else happens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.quant.errors import FormatError
from fewbits.quant.formats import parse_layout
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.quantizers import QUANTIZERS
from fewbits.quant.quantizers.fit import fit_layout
from fewbits.quant.quantizers.rtn import RTN
from fewbits.quant.types import LayerStats, Layout

torch.set_num_threads(1)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


@pytest.mark.parametrize("name", ["int1_g8", "int2_g8", "int3_sym_g8", "int4_row", "int8_g4_bf16", "int5_sym_row_f32"])
@pytest.mark.parametrize("clip", ["minmax", "search"])
def test_every_weight_gets_the_nearest_value(name: str, clip: str) -> None:
    layout = parse_layout(name, 24)
    weight = weights(5, 24)
    tensor, facts = RTN(clip).quantize(weight, None, layout)
    assert facts == {} and tensor.shape == (5, 24) and tensor.layout == layout
    (segment,) = tensor.segments
    fmt = segment.format
    for row in range(5):
        for column in range(24):
            group = column * fmt.groups(24) // 24
            params = {k: v[row, group] for k, v in segment.params.items()}
            values = fmt.decode(torch.arange(1 << fmt.code_bits, dtype=torch.uint8), params)
            distance = (values - weight[row, column]).abs()
            got = tensor.dequantize()[row, column]
            assert (got - weight[row, column]).abs() <= distance.min() + 1e-7
            assert got == values[segment.codes[row, column].long()]


def test_min_max_error_is_at_most_half_a_step() -> None:
    weight = weights(32, 64)
    tensor, _ = RTN().quantize(weight, None, Layout.of(IntFormat(4, 16, False, torch.float32), 64))
    step = tensor.segments[0].params["scale"].repeat_interleave(16, 1)
    # an integer zero point shifts the grid by up to half a step, which one end of the range may miss
    assert ((tensor.dequantize() - weight).abs() <= step + 1e-6).all()
    inside = (tensor.segments[0].codes > 0) & (tensor.segments[0].codes < 15)
    assert ((tensor.dequantize() - weight).abs() <= step / 2 + 1e-6)[inside].all()


def test_clip_search_lowers_the_error_and_heeds_the_statistics() -> None:
    weight = weights(64, 64).pow(3)
    layout = parse_layout("int2_g32", 64)
    importance = torch.rand(64, generator=torch.Generator().manual_seed(1)).pow(4) + 1e-6
    stats = LayerStats(torch.diag(importance) * 10, 10)

    def losses(tensor: Tensor) -> tuple[float, float]:
        squares = (tensor - weight).square()
        return float(squares.sum()), float((squares * importance).sum())

    plain = losses(RTN("minmax").quantize(weight, None, layout)[0].dequantize())
    search = losses(RTN("search").quantize(weight, None, layout)[0].dequantize())
    weighted = losses(RTN("search").quantize(weight, stats, layout)[0].dequantize())
    assert search[0] < plain[0] and weighted[1] < search[1] < plain[1] and search[0] < weighted[0]


def test_min_max_ignores_the_statistics() -> None:
    weight, layout = weights(8, 32), parse_layout("int3_g16", 32)
    stats = LayerStats(torch.diag(torch.rand(32)), 1)
    a, b = (RTN().quantize(weight, s, layout)[0] for s in (None, stats))
    assert torch.equal(a.dequantize(), b.dequantize())


def test_rows_do_not_see_each_other() -> None:
    """However rows are chunked or stacked, each gets the same codes."""
    weight = weights(70, 64)
    layout = parse_layout("int3_g32", 64)
    whole, _ = RTN("search").quantize(weight, None, layout)
    parts = whole.split_rows([1, 64, 5])
    for part, piece in zip(parts, weight.split([1, 64, 5])):
        alone, _ = RTN("search").quantize(piece, None, layout)
        assert torch.equal(part.segments[0].codes, alone.segments[0].codes)
        assert torch.equal(part.dequantize(), alone.dequantize())


def test_fit_in_chunks_equals_fit_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.quant.quantizers import fit

    weight, importance = weights(50, 64), torch.rand(64)
    layout = parse_layout("int3_g16[32]+int4_row[32]", 64)
    once = list(fit_layout(weight, importance, layout))
    monkeypatch.setattr(fit, "_CHUNK_WEIGHTS", 64)
    again = fit_layout(weight, importance, layout)
    for (run, params, start), (chunked_run, chunked, chunked_start) in zip(once, again):
        assert run == chunked_run and start == chunked_start
        assert all(torch.equal(params[k], chunked[k]) for k in params)
        fmt, columns = run
        part = weight[:, start : start + columns].view(50, fmt.groups(columns), -1)
        direct = fmt.fit(part, importance[start : start + columns].view(fmt.groups(columns), -1))
        assert all(torch.equal(params[k], direct[k]) for k in params)


def test_group_size_that_does_not_divide() -> None:
    with pytest.raises(FormatError, match="K = 40 is not a multiple of group_size 16"):
        RTN().quantize(weights(2, 40), None, Layout.of(IntFormat(4, 16), 40))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_contract(name: str) -> None:
    """Every registered quantizer gives the layout asked for, the same codes twice, facts that are floats."""
    quantizer = QUANTIZERS[name]()
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(3))
    stats = LayerStats(x.T @ x, 200)
    xtx, weight = stats.xtx.clone(), weights(6, 32)
    before = weight.clone()
    mixed = "ternary_g16[16]+ternary_row[16]" if name == "bitnet" else "int3_g16[16]+int4_sym_row[16]"
    layout = parse_layout(mixed, 32)
    first, facts = quantizer.quantize(weight, stats, layout, seed=1)
    again, _ = quantizer.quantize(weight, stats, layout, seed=1)
    assert first.layout == layout and first.shape == (6, 32)
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(first.segments, again.segments))
    assert all(s.codes.dtype == torch.uint8 and s.codes.shape == (6, 16) for s in first.segments)
    assert torch.equal(weight, before) and torch.equal(stats.xtx, xtx)
    assert all(isinstance(v, float) for v in facts.values())
    relative = float((first.dequantize() - weight).square().sum() / weight.square().sum())
    assert relative < (0.4 if name == "bitnet" else 0.2)
    if not quantizer.needs_stats:
        quantizer.quantize(weight, None, layout)

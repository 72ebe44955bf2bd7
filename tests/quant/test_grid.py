"""Tables of values: the public definitions bit by bit, golden groups, what is chosen, and what is stored."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.quant.errors import FormatError
from fewbits.quant.formats import parse_format, parse_layout
from fewbits.quant.formats.grid import E2M1, NF4, TABLES, GridFormat
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.quantizers import GPTQ, RTN
from fewbits.quant.types import LayerStats, Layout, QuantizedTensor, Segment

torch.set_num_threads(1)

GOLDEN = torch.tensor([[0.9, -0.4, 0.1, -1.3, 0.05, 0.7, -0.2, 0.3]])
NAMES = [f"{t}_g32" if t[:2] not in ("mx", "nv") else t for t in TABLES]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(name: str, weight: Tensor, clip: str = "minmax") -> Segment:
    made, _ = RTN(clip=clip).quantize(weight, None, parse_layout(name, weight.shape[1]))  # type: ignore[arg-type]
    return made.segments[0]


def error(name: str, weight: Tensor, clip: str) -> float:
    return float((weight - rounded(name, weight, clip).dequantize()).square().mean() / weight.square().mean())


# -- tables ------------------------------------------------------------------------------------------------------------


def test_tables() -> None:
    assert {n: (len(t), len(t[0])) for n, t in TABLES.items()} == {
        "nf4": (1, 16), "fp3": (1, 8), "fp4": (1, 16), "fpq4": (3, 16), "bitmod3": (4, 8), "bitmod4": (4, 16),
        "nupes3": (16, 8), "nupes4": (16, 16), "mxfp4": (1, 16), "nvfp4": (1, 16)}
    for exponent_bits, table in zip((1, 2, 3), TABLES["fpq4"]):
        mantissa = 3 - exponent_bits
        values = []
        for code in range(8):  # IEEE: subnormal at exponent 0
            e, m = code >> mantissa, (code & ((1 << mantissa) - 1)) / (1 << mantissa)
            values.append(m * 2.0 if e == 0 else (1 + m) * 2.0**e)
        unit = values[-1] / table[7]
        assert [v / unit for v in values] == list(table[:8]) and [-v for v in table[1:8]] == list(table[9:])
    for bits, special in ((3, [3, -3, 6, -6]), (4, [10, -10, 16, -16])):
        base = set(TABLES["fp3"][0]) if bits == 3 else {2 * v for v in TABLES["fp4"][0]}
        assert [set(t) - base for t in TABLES[f"bitmod{bits}"]] == [{s} for s in special]
        assert all(len(set(t)) == 1 << bits for t in TABLES[f"bitmod{bits}"])


def test_nf4_is_made_of_quantiles() -> None:
    normal = torch.distributions.Normal(0, 1)
    offset = 0.9677083
    up = normal.icdf(torch.linspace(offset, 0.5, 9)[:-1])
    down = -normal.icdf(torch.linspace(offset, 0.5, 8)[:-1])
    values = torch.cat([up, torch.zeros(1), down]).sort().values
    assert torch.allclose(values / values.max(), torch.tensor(NF4), atol=2e-5)


def test_the_power_of_one_is_the_uniform_grid() -> None:
    """Bit for bit that of symmetric integers; and powers of products are products of powers."""
    for bits in (3, 4):
        m = (1 << bits - 1) - 1
        uniform = next(t for t in TABLES[f"nupes{bits}"] if math.isclose(t[0], -(m + 1) / m))
        weight, scale = random(4, 32), torch.full((4, 1), 0.25).half()
        own = IntFormat(bits, None, True)
        kind = torch.full((4, 1), TABLES[f"nupes{bits}"].index(uniform), dtype=torch.uint8)
        grid = parse_format(f"nupes{bits}_row")
        a = Segment.nearest(own, weight, {"scale": scale}).dequantize()
        params = {"scale": (scale.float() * m), "type": kind}
        assert torch.allclose(Segment.nearest(grid, weight, params).dequantize(), a, atol=1e-6)
    table = TABLES["nupes4"][6]
    assert all(x <= y for x, y in itertools.pairwise(table))


@given(st.sampled_from(NAMES), st.integers(0, 9))
@settings(max_examples=40, deadline=None)
def test_every_value_of_a_table_is_kept(name: str, seed: int) -> None:
    fmt = parse_format(name)
    assert isinstance(fmt, GridFormat)
    kind = seed % fmt.types
    values = torch.tensor([TABLES[fmt.family][kind]])
    params = {"scale": torch.full((1, 1), 0.5), "type": torch.full((1, 1), kind, dtype=torch.uint8),
              "global_scale": torch.ones(1, 1)}
    codes = fmt.encode(values * 0.5, params)
    assert torch.equal(fmt.decode(codes, params), values * 0.5)


def test_ties_go_to_even() -> None:
    fmt = parse_format("fp4_row")
    ties = torch.tensor([[0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]])
    params = {"scale": torch.ones(1, 1)}
    expected = torch.tensor([[0, 1, 1, 2, 2, 4, 4.0]])
    assert torch.equal(fmt.decode(fmt.encode(ties, params), params), expected)
    assert torch.equal(fmt.decode(fmt.encode(-ties, params), params), -expected)
    assert float(fmt.decode(fmt.encode(torch.tensor([[1e9]]), params), params)) == 6


# -- golden groups -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, scale, kind, levels, loss", [
    ("bitmod3_row", 0.325, 0, [3, -1, 0, -4, 0, 2, -1, 1], 0.042500),
    ("bitmod4_row", 0.108333, 0, [8, -4, 1, -12, 0, 6, -2, 3], 0.008194),
])
def test_golden(name, scale, kind, levels, loss) -> None:
    made = rounded(name, GOLDEN)
    fmt = made.format
    assert isinstance(fmt, GridFormat)
    assert float(made.params["scale"]) == pytest.approx(scale, abs=1e-4) and int(made.params["type"]) == kind
    assert [TABLES[fmt.family][kind][c] for c in made.codes[0].tolist()] == levels
    assert float((GOLDEN - made.dequantize()).square().sum()) == pytest.approx(loss, abs=5e-5)


def test_mxfp4_golden() -> None:
    weight = torch.cat([GOLDEN, torch.zeros(1, 24)], 1)
    made = rounded("mxfp4", weight)
    assert float(made.params["scale"]) == 0.25
    assert [TABLES["mxfp4"][0][c] for c in made.codes[0, :8].tolist()] == [4, -1.5, 0.5, -6, 0, 3, -1, 1]
    assert float((weight - made.dequantize()).square().sum()) == pytest.approx(0.061250, abs=1e-6)
    # the largest may be clipped: 7.9 is read as 6
    assert float(rounded("mxfp4", torch.cat([torch.tensor([[7.9]]), torch.zeros(1, 31)], 1)).dequantize()[0, 0]) == 6


def test_scales_of_mxfp4_are_bytes() -> None:
    weight = random(5, 64) * torch.tensor([1.0, 1e-3, 1e4, 0, 1e-30])[:, None]
    made, _ = RTN(clip="search").quantize(weight, None, parse_layout("mxfp4", 64))
    stored = made.pack()["weight_scale"]
    assert stored.dtype == torch.uint8 and int(stored.max()) < 255
    assert torch.equal(torch.exp2(stored.float() - 127), made.segments[0].params["scale"])
    assert torch.equal(made.dequantize()[3], torch.zeros(64))


def test_nvfp4_has_one_scale_for_the_tensor() -> None:
    weight = random(200, 64) * torch.linspace(0.01, 3, 200)[:, None]  # more rows than are fitted at a time
    layout = parse_layout("nvfp4", 64)
    x = random(256, 64, seed=2)
    for made in (RTN().quantize(weight, None, layout)[0], RTN(clip="search").quantize(weight, None, layout)[0],
                 GPTQ().quantize(weight, LayerStats(x.T @ x, 256), layout)[0]):
        stored = made.pack()
        expected = 448 * 6 / weight.abs().max()
        assert torch.equal(stored["weight_global_scale"], expected[None])
        assert stored["weight_scale"].dtype == torch.float8_e4m3fn and stored["weight_scale"].shape == (200, 4)
        again = QuantizedTensor.unpack(stored, layout).dequantize()
        assert torch.equal(again, made.dequantize())
        rows = made.rows(slice(20, 70))
        assert torch.equal(QuantizedTensor.unpack(rows.pack(), layout).dequantize(), again[20:70])
    assert torch.equal(rounded("nvfp4", torch.zeros(2, 32)).dequantize(), torch.zeros(2, 32))


# -- distortion --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, covering, searched", [
    ("nf4_g128", 0.00917, None), ("nf4_g64", 0.00848, None), ("fp4_g128", 0.01193, 0.01044),
    ("fp3_g128", 0.0572, 0.0434), ("bitmod3_g128", 0.0382, 0.0328), ("bitmod4_g128", 0.0096, 0.0086),
    ("mxfp4", 0.01327, 0.01249), ("nvfp4", 0.00907, 0.00759),
])
def test_gaussian_distortion(name: str, covering: float, searched: float | None) -> None:
    weight = random(1024, 128)
    assert error(name, weight, "minmax") == pytest.approx(covering, rel=0.02)
    if searched is not None:
        assert error(name, weight, "search") < searched * 1.02


def test_choices() -> None:
    """More to choose from is never worse, and heavier tails want larger exponents."""
    weight = random(256, 128)
    assert error("bitmod4_g128", weight, "search") < error("fp4_g128", weight, "search")
    assert error("bitmod3_g128", weight, "search") < min(error(n, weight, "search") for n in ("fp3_g128", "int3_g128"))
    assert error("nupes3_g128", weight, "search") < error("int3_sym_g128", weight, "search")
    assert error("nupes4_g128", weight, "search") < error("int4_sym_g128", weight, "search")
    for name in ("fpq4_row", "bitmod3_row", "nupes4_row"):
        assert error(name, weight, "search") <= error(name, weight, "minmax")

    def split(values: Tensor) -> int:
        return int(rounded("fpq4_row", values[None], "search").params["type"])

    uniform = torch.linspace(-1, 1, 512)
    assert split(uniform) == 0
    powers = torch.exp2(torch.linspace(-6, 0, 7).round()).repeat(64)
    assert split(powers * random(len(powers)).sign()) == 2


def test_the_signs_of_a_group_choose_the_special_value() -> None:
    weight = torch.cat([GOLDEN, GOLDEN * 3 - 1], 1)
    a, b = rounded("bitmod3_row", weight, "search"), rounded("bitmod3_row", -weight, "search")
    assert int(a.params["type"]) ^ 1 == int(b.params["type"])
    assert torch.equal(a.dequantize(), -b.dequantize())


# -- what is stored ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 7])
def test_what_is_stored(name: str, rows: int) -> None:
    weight = random(rows, 96) * 0.05
    layout = parse_layout(name, 96)
    made, _ = RTN(clip="search").quantize(weight, None, layout)
    stored = made.pack()
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == layout.storage(rows)
    assert made.bits_per_weight == 8 * sum(t.nbytes for t in stored.values()) / (rows * 96)
    assert torch.equal(QuantizedTensor.unpack(stored, layout).dequantize(), made.dequantize())
    own = made.segments[0]
    assert torch.equal(Segment.nearest(own.format, made.dequantize(), own.params).dequantize(), made.dequantize())
    bigger, _ = RTN(clip="search").quantize(weight * 4, None, layout)
    assert torch.allclose(bigger.dequantize(), made.dequantize() * 4, rtol=1e-6)


def test_damaged_checkpoints() -> None:
    made, _ = RTN().quantize(random(2, 32), None, Layout.of(parse_format("fpq4_g8"), 32))
    stored = made.pack()
    stored["weight_type"] = torch.full_like(stored["weight_type"], -1)
    with pytest.raises(FormatError, match="weight_type: got 3, fpq4_g8 has 3 tables"):
        QuantizedTensor.unpack(stored, made.layout)
    made, _ = RTN().quantize(random(2, 32), None, Layout.of(parse_format("nvfp4"), 32))
    for bad in (0.0, -1.0, math.inf, math.nan):
        stored = {**made.pack(), "weight_global_scale": torch.tensor([bad])}
        with pytest.raises(FormatError, match="weight_global_scale: got"):
            QuantizedTensor.unpack(stored, made.layout)


def test_e2m1() -> None:
    assert E2M1 == (0, 0.5, 1, 1.5, 2, 3, 4, 6)

"""Few levels a group: exact solvers against brute force, golden values, what is stored, and the joint fit of scales."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.quant.bitpack import pack_trits, unpack_trits
from fewbits.quant.errors import FormatError
from fewbits.quant.formats import parse_format, parse_layout
from fewbits.quant.formats.levels import BASES, LevelsFormat
from fewbits.quant.quantizers import GPTQ, RTN
from fewbits.quant.quantizers.bitnet import BitNet
from fewbits.quant.solvers import als, three_means, two_magnitudes, two_means
from fewbits.quant.types import LayerStats, Layout, QuantizedTensor, Segment, proxy_loss

torch.set_num_threads(1)

GOLDEN = torch.tensor([[0.9, -0.4, 0.1, -1.3, 0.05, 0.7, -0.2, 0.3]])
ALL = [f"{b}{m}" for b in BASES for m in ("", "_mean")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(name: str, weight: Tensor, importance: Tensor | None = None) -> Segment:
    fmt = parse_format(name)
    groups = weight.view(len(weight), fmt.groups(weight.shape[1]), -1)
    return Segment.nearest(fmt, weight, fmt.fit(groups, importance))


def loss(weight: Tensor, values: Tensor, h: Tensor | float = 1.0) -> float:
    return float((h * (weight - values).square()).sum())


def least(w: Tensor, h: Tensor, design: Tensor, codes: Tensor) -> float:
    """The least weighted loss of ``w (g,)`` over all ``codes (n, g)``, with least-squares parameters."""
    d = design[codes]  # (n, g, p)
    root = h.sqrt()
    right = (w * root)[None, :, None].expand(len(codes), -1, 1)
    theta = torch.linalg.lstsq((d * root[:, None]).double(), right.double(), driver="gelsd").solution
    return float((right - (d * root[:, None]).double() @ theta).square().sum((1, 2)).min())


# -- solvers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("name", ["ternary", "ternary_mean", "binary", "binary_mean", "binary2", "seq"])
def test_exact_solvers_equal_brute_force(name: str, seed: int) -> None:
    w = random(7 if "ternary" in name else 6, seed=seed)
    h = torch.ones_like(w) if seed % 3 == 0 else random(*w.shape, seed=seed + 99).abs() + 0.02
    fmt = parse_format(f"{name}_row")
    assert isinstance(fmt, LevelsFormat)
    codes = torch.tensor(list(itertools.product(range(fmt.basis.levels), repeat=len(w))))
    found = fmt._solve(w[None, None], h[None, None])[0, 0]
    levels = fmt.design() @ found
    own = float((h * (w[:, None] - levels).square().amin(1)).sum())
    assert own == pytest.approx(least(w, h, fmt.design(), codes), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name, hits", [("fdb", 0.9), ("binary2_mean", 0.8), ("binary3", 0.5)])
def test_alternating_comes_near_the_optimum(name: str, hits: float) -> None:
    """Optima are found by all cuts of the sorted weights, in every order that the levels can have."""
    fmt = parse_format(f"{name}_row")
    assert isinstance(fmt, LevelsFormat)
    size, found = 6, []
    for seed in range(20):
        w = random(size, seed=seed).sort().values
        orders = {tuple((fmt.design() @ theta).argsort().tolist()) for theta in random(400, len(fmt.names), seed=7)}
        cuts = itertools.combinations_with_replacement(range(size + 1), fmt.basis.levels - 1)
        ranks = torch.tensor([[sum(j >= c for c in cut) for j in range(size)] for cut in cuts])
        codes = torch.cat([torch.tensor(order)[ranks] for order in orders])
        best = least(w, torch.ones(size), fmt.design(), codes)
        theta = als(w[None, None], torch.ones(1, 1, size), fmt.design(), dual=name == "fdb")[0, 0]
        own = float((w[:, None] - fmt.design() @ theta).square().amin(1).sum())
        assert own >= best - 1e-5
        found.append(own <= 1.01 * best + 1e-5)
    assert sum(found) >= hits * len(found)


def test_two_means_of_magnitudes_are_the_pair_of_signs() -> None:
    a, m = two_means(GOLDEN.abs(), torch.ones_like(GOLDEN))[0]
    assert (float(m), float(a)) == pytest.approx((0.588333, 0.378333), abs=1e-5)


def test_groups_that_are_one_value_zero_or_one_weight() -> None:
    ones = torch.ones(3, 5)
    assert torch.equal(two_magnitudes(torch.zeros(3, 5), ones, 0, 1), torch.zeros(3, 1))
    assert torch.equal(three_means(torch.zeros(3, 5), ones), torch.zeros(3, 2))
    for w in (torch.full((2, 5), 0.7), torch.tensor([[0.0, 0, 0.7, 0, 0]]), torch.tensor([[0.7]])):
        for name in ALL:
            made = rounded(f"{name}_row", w)
            assert made.dequantize().isfinite().all()
            if name in ("ternary", "ternary_mean", "binary_mean") or (len(w) == 2 and name != "fdb"):
                assert torch.allclose(made.dequantize(), w, atol=2e-3), name
    for name in ALL:
        assert torch.equal(rounded(f"{name}_row", torch.zeros(2, 6)).dequantize(), torch.zeros(2, 6)), name


# -- golden values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, params, expected", [
    ("ternary", {"scale": 0.966667}, 0.489167),
    ("ternary_mean", {"scale": 1.002174, "mean": -0.106522}, 0.402174),
    ("binary_mean", {"scale": 0.521667, "mean": -0.111667}, 1.248667),
    ("binary2", {"scale": 0.588333, "scale2": 0.378333}, 0.268667),
    ("fdb", {"scale": -1.20, "scale2": 0.85}, 0.162500),
])
def test_golden(name: str, params: dict[str, float], expected: float) -> None:
    made = rounded(f"{name}_row", GOLDEN)
    assert {k: float(v) for k, v in made.params.items()} == pytest.approx(params, abs=6e-4)
    assert loss(GOLDEN, made.dequantize()) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("measure, gamma, codes, expected", [
    ("absmean", 0.49375, [1, -1, 0, -1, 0, 1, 0, 1], 0.956445),
    ("absmedian", 0.30, [1, -1, 0, -1, 0, 1, -1, 1], 1.552500),
])
def test_bitnet_golden(measure, gamma, codes, expected) -> None:
    made, facts = BitNet(measure).quantize(GOLDEN, None, parse_layout("ternary_row", 8))
    assert facts["gamma"] == pytest.approx(gamma, abs=2e-4)
    assert (made.segments[0].codes.int() - 1).tolist() == [codes]
    assert loss(GOLDEN, made.dequantize()) == pytest.approx(expected, abs=2e-3)
    with pytest.raises(FormatError, match="ternary weights alone"):
        BitNet().quantize(GOLDEN, None, parse_layout("int2_row", 8))


@pytest.mark.parametrize("name, expected", [
    ("ternary", 0.18536), ("ternary_mean", 0.17860), ("binary2", 0.1129), ("binary2_mean", 0.1085), ("fdb", 0.1205),
])
def test_gaussian_distortion_of_groups(name: str, expected: float) -> None:
    weight = random(2048, 128)
    made, _ = RTN().quantize(weight, None, parse_layout(f"{name}_g128", 128))
    assert loss(weight, made.dequantize()) / float(weight.square().sum()) == pytest.approx(expected, rel=0.02)


def test_gaussian_distortion_of_the_population() -> None:
    """One group of everything: the optimal quantizers of a normal distribution, and BitNet's far from them."""
    weight = random(1, 1 << 18)
    expected = {"binary": 0.3634, "ternary": 0.1902, "seq": 0.1188, "binary2": 0.1175}
    for name, error in expected.items():
        own = rounded(f"{name}_row", weight).dequantize()
        assert loss(weight, own) / weight.numel() == pytest.approx(error, rel=0.02)
    for measure, error in (("absmean", 0.2634), ("absmedian", 0.3180)):
        made, _ = BitNet(measure).quantize(weight, None, parse_layout("ternary_row", weight.shape[1]))  # type: ignore
        assert loss(weight, made.dequantize()) / weight.numel() == pytest.approx(error, rel=0.02)
    residual, errors = weight, []
    for _ in range(4):  # greedy bases, one after another
        made = rounded("binary_row", residual)
        residual = residual - made.dequantize()
        errors.append(float(residual.square().mean()))
    assert errors == pytest.approx([0.3634, 0.1305, 0.0584, 0.0329], rel=0.02)
    for count, greedy in zip((2, 3, 4), errors[1:]):
        made = rounded(f"binary{count}_row", weight)
        assert loss(weight, made.dequantize()) / weight.numel() < greedy


# -- codes and bytes ---------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_trits_round_trip(data) -> None:
    rows, columns = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 23))
    codes = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=rows * columns, max_size=rows * columns)))
    codes = codes.view(rows, columns).to(torch.uint8)
    packed = pack_trits(codes)
    assert packed.shape == (rows, -(-columns // 5)) and torch.equal(unpack_trits(packed, columns), codes)


def test_trits_are_those_of_ggml() -> None:
    assert int(pack_trits(torch.tensor([[2, 0, 1, 1, 2]]))) == 186  # of 1, -1, 0, 0, 1
    every = torch.tensor(list(itertools.product(range(3), repeat=5)))
    assert len(pack_trits(every).unique()) == 243 and torch.equal(unpack_trits(pack_trits(every), 5), every.byte())
    assert int(unpack_trits(torch.arange(256).byte()[:, None], 5).max()) == 2
    with pytest.raises(ValueError, match="needed 0 to 2"):
        pack_trits(torch.tensor([[3]]))


@pytest.mark.parametrize("name", [*(f"{b}_g{g}" for b in ALL for g in (7, 35)), "ternary_g7_b3", "ternary_mean_row_b3"])
def test_what_is_stored(name: str) -> None:
    weight = random(3, 35)
    layout = parse_layout(name, 35)
    made, _ = RTN(clip="search").quantize(weight, None, layout)
    stored = made.pack()
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == layout.storage(3)
    assert made.bits_per_weight == 8 * sum(t.nbytes for t in stored.values()) / 105
    again = QuantizedTensor.unpack(stored, layout)
    assert torch.equal(again.dequantize(), made.dequantize())
    segment = made.segments[0]
    assert torch.equal(Segment.nearest(segment.format, made.dequantize(), segment.params).dequantize(),
                       made.dequantize())


@pytest.mark.parametrize("name", ALL)
def test_scales_and_signs_go_through(name: str) -> None:
    weight = random(16, 64)
    made = rounded(f"{name}_g32", weight).dequantize()
    assert torch.equal(rounded(f"{name}_g32", weight * 4).dequantize(), made * 4)
    other = loss(-weight, rounded(f"{name}_g32", -weight).dequantize())
    assert other == pytest.approx(loss(weight, made), rel=5e-3)
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    moved = rounded(f"{name}_row", weight[:, :32][:, order]).dequantize()
    assert torch.allclose(moved, rounded(f"{name}_row", weight[:, :32]).dequantize()[:, order], atol=2e-3)


def test_a_fourth_ternary_code_is_refused() -> None:
    made, _ = RTN().quantize(random(2, 16), None, parse_layout("ternary_row", 16))
    stored = made.pack()
    stored["weight_packed"] |= -1
    with pytest.raises(FormatError, match="got a code of 3, ternary_row has 3"):
        QuantizedTensor.unpack(stored, made.layout)


def test_scales_beyond_float16_are_refused() -> None:
    with pytest.raises(FormatError, match=r"scale: got .*float16 holds at most"):
        rounded("ternary_row", random(1, 8) * 1e6)


# -- scales fitted to codes --------------------------------------------------------------------------------------------


def stats(columns: int, seed: int = 5) -> LayerStats:
    x = random(4 * columns, columns, seed=seed) @ random(columns, columns, seed=seed + 1)
    return LayerStats(x.T @ x, len(x))


def test_rescaling_by_hand() -> None:
    """A row, one group, a Hessian of three columns: scale and mean of the golden example."""
    hessian = torch.tensor([[2, 0.5, 0], [0.5, 1, 0.3], [0, 0.3, 1]])
    weight = torch.tensor([[1.0, -0.5, 0.2]])
    from fewbits.quant.quantizers.rescale import rescaled

    fmt = parse_format("ternary_mean_row")
    start = Segment(fmt, torch.tensor([[2, 0, 1]], dtype=torch.uint8),
                    {"scale": torch.tensor([[0.75]]).half(), "mean": torch.tensor([[0.2333]]).half()})
    made = rescaled(QuantizedTensor((1, 3), (start,)), [weight], hessian)
    params = made.segments[0].params
    assert (float(params["scale"]), float(params["mean"])) == pytest.approx((0.762092, 0.236881), abs=5e-4)
    error = weight - made.dequantize()
    assert float((error @ hessian * error).sum()) == pytest.approx(0.001466, abs=5e-6)


@pytest.mark.parametrize("name", ["ternary_g16", "ternary_mean_g32", "binary2_mean_g16", "fdb_row", "int3_g16",
                                  "bitmod3_g16", "int4_g16[32]+binary_mean_row[32]", "had:ternary_row"])
def test_rescaling_never_hurts_and_keeps_codes(name: str) -> None:
    weight, seen = random(48, 64), stats(64)
    layout = parse_layout(name, 64)
    plain, _ = GPTQ(damp=1e-4).quantize(weight, seen, layout)
    fitted, _ = GPTQ(damp=1e-4, rescale=True).quantize(weight, seen, layout)
    for a, b in zip(plain.segments, fitted.segments):
        assert torch.equal(a.codes, b.codes)
    before, after = proxy_loss(weight, plain, seen)[0], proxy_loss(weight, fitted, seen)[0]
    assert after < before * (1.001 if name.startswith("had") else 1)
    assert torch.equal(QuantizedTensor.unpack(fitted.pack(), layout).dequantize(), fitted.dequantize())


def test_rescaling_leaves_formats_without_free_scales() -> None:
    weight, seen = random(16, 64), stats(64)
    for name in ("mxfp4", "nvfp4"):
        layout = Layout.of(parse_format(name), 64)
        plain, _ = GPTQ().quantize(weight, seen, layout)
        fitted, _ = GPTQ(rescale=True).quantize(weight, seen, layout)
        assert torch.equal(plain.dequantize(), fitted.dequantize())

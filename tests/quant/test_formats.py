"""Formats: names, parameters, exact storage, and a contract that every registered family keeps."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewbits.quant.errors import FormatError
from fewbits.quant.formats import EXAMPLES, FORMATS, layout_name, parse_format, parse_layout
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.quantizers.rtn import RTN
from fewbits.quant.types import Format, Layout, QuantizedTensor, Segment, nominal_bits

torch.set_num_threads(1)

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EVERY = [
    IntFormat(bits, group, symmetric, dtype)
    for bits, group, symmetric, dtype in itertools.product(range(1, 9), (8, None), (False, True), DTYPES)
]


def names(fmt: IntFormat) -> str:
    return fmt.name


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def fitted(fmt: Format, weight: Tensor, importance: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """Codes ``(N, K)`` and parameters ``(N, G)`` of a weight, each group by itself."""
    rows, columns = weight.shape
    params = fmt.fit(weight if fmt.joint else weight.view(rows, fmt.groups(columns), -1), importance)
    return Segment.nearest(fmt, weight, params).codes, params


def broadcast(params: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.unsqueeze(-1) for k, v in params.items()}


def error(fmt: Format, weight: Tensor, params: dict[str, Tensor], importance: Tensor) -> Tensor:
    """``sum_j importance_j (w_j - q_j)^2`` of each group, from the codes, in float64."""
    decoded = fmt.decode(fmt.encode(weight, broadcast(params)), broadcast(params))
    return (importance.double() * (weight.double() - decoded.double()) ** 2).sum(-1)


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", EVERY, ids=names)
def test_name_round_trip(fmt: IntFormat) -> None:
    assert parse_format(fmt.name) == fmt
    assert parse_layout(layout_name(Layout.of(fmt, 64)), 64) == Layout.of(fmt, 64)


def test_names_are_canonical_and_different() -> None:
    assert len({f.name for f in EVERY}) == len(EVERY)
    assert IntFormat(4, 64).name == "int4_g64"
    assert IntFormat(8, None, True).name == "int8_sym_row"
    assert IntFormat(3, 128, False, torch.bfloat16).name == "int3_g128_bf16"


@pytest.mark.parametrize("name", [
    "", "int", "int4", "int0_g64", "int9_g64", "int4_g0", "int4_g-64", "int4_g064", "INT4_g64", " int4_g64",
    "int4_g64 ",
    "int4_g64\n", "int4_g64_f16", "int4_sym", "int4_row_sym", "nf5_g64", "binary_g64_b3", "nvfp4_g16",
    "int4_g64[64]", "int44_g64",
])
def test_bad_names(name: str) -> None:
    with pytest.raises(FormatError, match="format: got"):
        parse_format(name)


def test_bad_name_suggests_the_nearest() -> None:
    with pytest.raises(FormatError, match="did you mean 'int4_g64'"):
        parse_format("int4_g_64")


def test_layout_names() -> None:
    layout = Layout(((IntFormat(4, 64), 128), (IntFormat(2, None, True), 40)))
    assert layout_name(layout) == "int4_g64[128]+int2_sym_row[40]"
    assert parse_layout(layout_name(layout), 168) == layout
    for runs in (layout, Layout.of(IntFormat(3, 64), 168)):
        name = layout_name(dataclasses.replace(runs, permuted=True))
        assert name == f"perm:{layout_name(runs)}"
        assert parse_layout(name, 168) == dataclasses.replace(runs, permuted=True)
    with pytest.raises(FormatError, match="covers 168 columns, the tensor has 160"):
        parse_layout(layout_name(layout), 160)
    for bad in ("int4_g64[128]+int2_g64", "int4_g64[x]", "int4_g64[-1]", "int4_g64[]", "int4_g64[128]+int4_g64[0]",
                f"int4_g64[{'9' * 5000}]", "perm:", "perm:perm:int4_g64", "PERM:int4_g64",
                "int4_g64[64]+perm:int4_g64[64]"):
        with pytest.raises(FormatError):
            parse_layout(bad, 128)


# -- group sizes -------------------------------------------------------------------------------------------------------


def test_group_size_that_does_not_divide() -> None:
    with pytest.raises(FormatError, match=r"K = 96 is not a multiple of group_size 64.*\(16, 32, 96\)") as info:
        IntFormat(4, 64).groups(96)
    assert "64, " not in str(info.value).partition("choose")[2]
    with pytest.raises(FormatError, match=r"K = 97 .*choose 'row' or 'auto'"):
        IntFormat(4, 64).groups(97)
    with pytest.raises(FormatError, match="K = 32"):
        IntFormat(4, 64).groups(32)


def test_groups() -> None:
    assert IntFormat(4, 32).groups(96) == 3
    assert IntFormat(4, None).groups(97) == 1


# -- pack and unpack ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", EVERY, ids=names)
@pytest.mark.parametrize(("rows", "columns"), [(1, 8), (13, 40), (33, 24)])
def test_pack_is_exact_and_as_large_as_announced(fmt: IntFormat, rows: int, columns: int) -> None:
    codes, params = fitted(fmt, weights(rows, columns))
    stored = fmt.pack(codes, params)
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == fmt.storage(rows, columns)
    assert all(t.is_contiguous() for t in stored.values())
    back, back_params = fmt.unpack(stored, rows, columns)
    assert back.dtype == torch.uint8 and torch.equal(back, codes)
    assert back_params.keys() == params.keys()
    for key, value in params.items():
        assert back_params[key].dtype == value.dtype and torch.equal(back_params[key], value)
    tensor = QuantizedTensor((rows, columns), (Segment(fmt, codes, params),))
    again = QuantizedTensor((rows, columns), (Segment(fmt, back, back_params),))
    assert torch.equal(tensor.dequantize(), again.dequantize())
    sizes = fmt.storage(rows, columns).values()
    announced = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in sizes)
    assert tensor.stored_bytes == announced + 16  # and two int64 of weight_shape


@pytest.mark.parametrize("fmt", [f for f in EVERY if f.group_size], ids=names)
def test_names_and_layout_are_those_of_compressed_tensors(fmt: IntFormat) -> None:
    stored = fmt.storage(64, 32)
    assert stored["weight_packed"] == ((64, fmt.code_bits), torch.int32)
    assert stored["weight_scale"] == ((64, 4), fmt.scale_dtype)
    assert ("weight_zero_point" in stored) == (not fmt.symmetric)
    if not fmt.symmetric:
        assert stored["weight_zero_point"] == ((2 * fmt.code_bits, 4), torch.int32)


def test_unpack_refuses_what_does_not_fit() -> None:
    fmt = IntFormat(4, 32)
    stored = fmt.pack(*fitted(fmt, weights(10, 96)))
    for name in fmt.storage(10, 96):
        with pytest.raises(FormatError, match=f"{name}: missing, int4_g32"):
            fmt.unpack({k: v for k, v in stored.items() if k != name}, 10, 96)
        for wrong in (stored[name][:-1], stored[name].unsqueeze(0), stored[name].T.contiguous(), stored[name].double()):
            with pytest.raises(FormatError, match=f"{name}: got .* int4_g32 needs"):
                fmt.unpack(stored | {name: wrong}, 10, 96)
    with pytest.raises(FormatError, match="weight_packed: got"):  # e.g. a checkpoint of other bits
        IntFormat(3, 32).unpack(stored, 10, 96)
    with pytest.raises(FormatError, match="weight_scale: got"):
        IntFormat(4, 16).unpack(stored, 10, 96)
    with pytest.raises(FormatError, match="weight_scale: got"):
        IntFormat(4, 32, False, torch.bfloat16).unpack(stored, 10, 96)


# -- codes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", EVERY, ids=names)
def test_every_code_survives_decoding_and_encoding(fmt: IntFormat) -> None:
    """Whatever valid codes and parameters are decoded, encoding the values again gives codes of the same values."""
    generator = torch.Generator().manual_seed(fmt.code_bits)
    scale = (torch.rand(64, 1, generator=generator) * 10 + 1e-3).to(fmt.scale_dtype)
    params = {"scale": scale, "zero_point": torch.randint(0, fmt.levels, (64, 1), generator=generator).to(torch.uint8)}
    codes = torch.arange(fmt.levels, dtype=torch.uint8).expand(64, -1)
    values = fmt.decode(codes, params)
    assert torch.equal(fmt.encode(values, params), codes)
    zero = fmt.levels / 2 if fmt.symmetric else params["zero_point"].float()
    assert torch.equal(values, scale.float() * (codes.float() - zero))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8), st.booleans(), st.sampled_from(DTYPES), st.booleans(),
    st.lists(st.floats(-100, 100, width=32), min_size=16, max_size=16), st.integers(-12, 3),
)
def test_requantizing_what_was_decoded_loses_nothing(
    bits: int, symmetric: bool, dtype: torch.dtype, search: bool, values: list[float], exponent: int
) -> None:
    fmt = IntFormat(bits, 8, symmetric, dtype)
    weight = torch.tensor(values).view(1, 2, 8) * 2.0**exponent
    params = fmt.fit(weight, torch.ones(8) if search else None)
    decoded = fmt.decode(fmt.encode(weight, broadcast(params)), broadcast(params))
    assert torch.isfinite(decoded).all()
    assert torch.equal(fmt.decode(fmt.encode(decoded, broadcast(params)), broadcast(params)), decoded)


@pytest.mark.parametrize("fmt", EVERY, ids=names)
@pytest.mark.parametrize("search", [False, True])
def test_parameters_are_as_stored(fmt: IntFormat, search: bool) -> None:
    weight = weights(40, 32).view(40, -1, 8)
    weight[0] = weight[0].abs() + 0.1  # positive only
    weight[1] = -weight[1].abs() - 0.1  # negative only
    weight[2] = 0.07  # constant
    weight[3] = 0
    weight[4] *= 1e-30
    params = fmt.fit(weight, torch.rand(8) if search else None)
    assert params["scale"].dtype == fmt.scale_dtype and params["scale"].shape == weight.shape[:-1]
    assert (params["scale"].float() > 0).all() and torch.isfinite(params["scale"].float()).all()
    assert ("zero_point" in params) == (not fmt.symmetric)
    if not fmt.symmetric:
        assert params["zero_point"].dtype == torch.uint8 and int(params["zero_point"].max()) < fmt.levels


@pytest.mark.parametrize("fmt", EVERY, ids=names)
@pytest.mark.parametrize("search", [False, True])
def test_zero_groups_decode_to_exact_zeros(fmt: IntFormat, search: bool) -> None:
    weight = weights(3, 16)
    weight[1] = 0
    importance = torch.ones(fmt.groups(16), 16 // fmt.groups(16)) if search else None
    codes, params = fitted(fmt, weight, importance)
    decoded = QuantizedTensor((3, 16), (Segment(fmt, codes, params),)).dequantize()
    assert (decoded[1] == 0).all()


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_one_sided_and_constant_groups(bits: int, dtype: torch.dtype, sign: int) -> None:
    """The range is widened to contain 0, so no zero point leaves [0, 2^b), and the error stays within half a step."""
    fmt = IntFormat(bits, 8, False, dtype)
    for group in (sign * (weights(6, 8).abs() + 0.3), torch.full((6, 8), sign * 0.3)):
        codes, params = fitted(fmt, group)
        zero = params["zero_point"].float()
        # the first or the last code; the one before the last where rounding raised the scale by so much
        assert (zero == 0).all() if sign > 0 else (zero >= (fmt.levels - 1) * (1 - torch.finfo(dtype).eps) - 0.5).all()
        decoded = fmt.decode(codes, params)
        step = params["scale"].float()
        # half a step, and what rounding the scale to its dtype moves the far end of the range by
        slack = (fmt.levels - 1) * step * torch.finfo(dtype).eps
        assert ((decoded - group).abs() <= step / 2 + slack + 1e-7).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [False, True])
def test_constant_groups_are_met_by_the_search(bits: int, symmetric: bool) -> None:
    fmt = IntFormat(bits, 8, symmetric, torch.float32)
    weight = torch.full((1, 1, 8), 0.3)
    params = fmt.fit(weight, torch.ones(8))
    decoded = fmt.decode(fmt.encode(weight, broadcast(params)), broadcast(params))
    if not symmetric or bits >= 3:  # symmetric 1 and 2 bits hardly reach upwards
        assert (decoded - 0.3).abs().max() <= 0.3 / fmt.levels


def test_asymmetric_one_bit_has_zero_and_one_end() -> None:
    fmt = IntFormat(1, 4, False, torch.float32)
    codes, params = fitted(fmt, torch.tensor([[0.0, 0.1, 0.9, 1.0], [0.0, -0.1, -0.9, -1.0]]))
    decoded = fmt.decode(codes.view(2, 1, 4), broadcast(params)).view(2, 4)
    assert decoded.tolist() == [[0, 0, 1, 1], [0, 0, -1, -1]]


def test_extreme_weights_stay_finite() -> None:
    for fmt in EVERY:
        for size in (1e-30, 1e-8, 1e3, 1e30):
            if size > 1e4 and fmt.scale_dtype == torch.float16:
                continue  # refused: see below
            codes, params = fitted(fmt, weights(2, 16) * size)
            assert torch.isfinite(params["scale"].float()).all()
            back = QuantizedTensor((2, 16), (Segment(fmt, codes, params),)).dequantize()
            assert torch.isfinite(back).all(), (fmt.name, size)


def test_a_scale_that_its_dtype_cannot_hold_is_an_error_that_says_so() -> None:
    weight = weights(4, 8) * 1e7
    with pytest.raises(FormatError, match=r"scale: got .*scale_dtype = 'bfloat16'"):
        IntFormat(4, 8).fit(weight, None)
    assert torch.isfinite(IntFormat(4, 8, scale_dtype=torch.bfloat16).fit(weight, None)["scale"].float()).all()


def test_small_weights_keep_their_precision() -> None:
    fmt, weight = IntFormat(8, 8), weights(64, 8) * 1e-2  # scales near 6e-6, below the normal range of float16
    codes, params = fitted(fmt, weight)
    back = QuantizedTensor((64, 8), (Segment(fmt, codes, params),)).dequantize()
    assert float((back - weight).norm() / weight.norm()) < 0.01


# -- clip search -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fmt", [f for f in EVERY if f.group_size], ids=names)
def test_clip_search_is_never_worse_than_min_max(fmt: IntFormat) -> None:
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(200, 1, 64, generator=generator).pow(3) * 0.02  # heavy tails
    importance = torch.rand(64, generator=generator).pow(4)
    found = error(fmt, weight, fmt.fit(weight, importance), importance)
    plain = error(fmt, weight, fmt.fit(weight, None), importance)
    assert (found <= plain * (1 + 1e-5)).all()
    if 2 <= fmt.code_bits <= 4:
        assert found.sum() < 0.9 * plain.sum()


def test_clip_search_heeds_importance() -> None:
    weight = torch.tensor([[[0.1, -0.1, 0.11, -0.09, 0.1, -0.1, 0.1, 1.0]]])
    fmt = IntFormat(3, 8, False, torch.float32)
    outlier = fmt.fit(weight, torch.tensor([1e-4] * 7 + [1.0]))
    bulk = fmt.fit(weight, torch.tensor([1.0] * 7 + [1e-4]))
    assert bulk["scale"] < 0.7 * outlier["scale"]


def test_clip_search_without_any_importance_falls_back_to_the_range() -> None:
    weight = weights(5, 8).view(5, 1, 8)
    fmt = IntFormat(3, 8)
    assert torch.equal(fmt.fit(weight, torch.zeros(8))["scale"], fmt.fit(weight, None)["scale"])


# -- several runs of columns -------------------------------------------------------------------------------------------


def test_segments_side_by_side() -> None:
    layout = parse_layout("int4_g32[64]+int2_sym_g8_bf16[24]+int7_row[13]", 101)
    weight = weights(9, 101)
    tensor, _ = RTN("search").quantize(weight, None, layout)
    assert tensor.layout == layout
    start = 0
    for fmt, columns in layout.runs:  # each as if it were alone
        run = weight[:, start : start + columns].contiguous()
        alone, _ = RTN("search").quantize(run, None, Layout.of(fmt, columns))
        assert torch.equal(tensor.dequantize()[:, start : start + columns], alone.dequantize())
        start += columns
    stored = tensor.pack()
    assert {k for k in stored if "packed" in k} == {"weight_packed", "weight_packed_1", "weight_packed_2"}
    assert "weight_zero_point_1" not in stored and "weight_zero_point_2" in stored
    back = QuantizedTensor.unpack(stored, layout)
    assert back.shape == (9, 101) and torch.equal(back.dequantize(), tensor.dequantize())
    announced = sum(
        torch.Size(shape).numel() * dtype.itemsize
        for fmt, columns in layout.runs for shape, dtype in fmt.storage(9, columns).values()
    )
    assert tensor.stored_bytes == announced + 16
    assert tensor.bits_per_weight == 8 * tensor.stored_bytes / (9 * 101)


def test_more_than_ten_segments() -> None:
    layout = parse_layout("+".join(f"int{1 + i % 8}_g4[8]" for i in range(12)), 96)
    tensor, _ = RTN().quantize(weights(3, 96), None, layout)
    assert torch.equal(QuantizedTensor.unpack(tensor.pack(), layout).dequantize(), tensor.dequantize())


# -- the contract of the registry --------------------------------------------------------------------------------------


def examples(family: str) -> list[Format]:
    found = [fmt for name in EXAMPLES if (fmt := FORMATS[family](name)) is not None]
    assert found, f"{family}: add a name of it to EXAMPLES"
    return found


@pytest.mark.parametrize("family", FORMATS)
def test_contract(family: str) -> None:
    for fmt in examples(family):
        assert isinstance(fmt, Format)
        assert parse_format(fmt.name) == fmt and hash(parse_format(fmt.name)) == hash(fmt)
        rows, columns = (16 if fmt.rotated else 7) * fmt.height, 128
        assert columns % fmt.groups(columns) == 0
        # rotated formats are made for values of one deviation
        weight = weights(rows, columns) * (20 if fmt.rotated else 1)
        codes, params = fitted(fmt, weight)
        assert codes.dtype == (torch.uint8 if fmt.code_bits <= 8 else torch.int32)
        assert int(codes.min()) >= 0 and int(codes.max()) < 1 << fmt.code_bits
        assert fmt.joint or all(v.shape == (rows, fmt.groups(columns)) for v in params.values())
        stored = fmt.pack(codes, params)
        assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == fmt.storage(rows, columns)
        back, back_params = fmt.unpack(stored, rows, columns)
        assert torch.equal(back, codes) and all(torch.equal(back_params[k], v) for k, v in params.items())
        tensor = QuantizedTensor((rows, columns), (Segment(fmt, codes, params),))
        decoded = tensor.dequantize()
        assert decoded.dtype == torch.float32 and decoded.shape == (rows, columns)
        again = Segment.nearest(fmt, decoded, params).dequantize()
        if family == "rvq" or "x2" in fmt.name:  # its beam may miss the very sum that it is given
            lost = float((again - decoded).square().mean())
            assert lost < 0.05 * float((weight - decoded).square().mean())
        else:
            assert torch.equal(again, decoded)
        shared = sum(t.nbytes for t in params.values()) if fmt.joint else 0
        assert nominal_bits(fmt) - 0.01 <= 8 * tensor.stored_bytes / (rows * columns)
        assert 8 * (tensor.stored_bytes - shared) / (rows * columns) < nominal_bits(fmt) + 2
        if not fmt.joint:
            assert 8 * tensor.stored_bytes >= fmt.code_bits * codes.numel()


def test_more_bits_are_better() -> None:
    weight = weights(16, 128)
    losses = []
    for bits in range(1, 9):
        tensor, _ = RTN().quantize(weight, None, Layout.of(IntFormat(bits, 32), 128))
        losses.append(float((tensor.dequantize() - weight).square().mean()))
    assert losses == sorted(losses, reverse=True)
    ratios = [a / b for a, b in itertools.pairwise(losses[2:])]
    assert all(3 < r < 6 for r in ratios)  # about 6 dB a bit

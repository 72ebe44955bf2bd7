"""4-bit floats and ternary formats against readers that others wrote: gguf, compressed-tensors and torchao.

Everything that they read back is compared bit for bit; where their own quantizers have our definition, so is what they
write.
"""

from __future__ import annotations

import dataclasses
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

from fewbits.quant.allocate.menu import ENGINES
from fewbits.quant.bitpack import pack_rows, pack_trits
from fewbits.quant.errors import FormatError
from fewbits.quant.formats import parse_format
from fewbits.quant.formats.grid import E2M1, GridFormat
from fewbits.quant.targets import Target
from fewbits.quant.types import Format, Layout, QuantizedTensor, Segment
from fewbits.serving.export.base import as_integers
from fewbits.serving.export.compressed_tensors import CompressedTensors, _compression, _weights, packed_tensors
from fewbits.serving.export.ggml import FLOATS, TERNARY, block_type, to_blocks
from fewbits.serving.export.gguf import Gguf

_ROWS, _COLUMNS = 6, 768


def quantized_by(fmt: Format, weight: Tensor, importance: Tensor | None = None) -> QuantizedTensor:
    """Rounded to nearest, over the whole range unless there is an importance."""
    groups = weight.view(len(weight), fmt.groups(weight.shape[1]), -1)
    weighed = None if importance is None else importance.view(groups.shape[1:]).expand_as(groups)
    params = fmt.fit(groups, weighed, **fmt.shared(weight))
    codes = fmt.encode(groups, {k: v.unsqueeze(-1) for k, v in params.items()}).view(weight.shape)
    return QuantizedTensor(tuple(weight.shape), (Segment(fmt, codes, params),))


def uneven(rows: int = _ROWS, columns: int = _COLUMNS) -> Tensor:
    """Rows of very different sizes, and some groups of zeros."""
    draw = torch.Generator().manual_seed(rows)
    weight = torch.randn(rows, columns, generator=draw)
    weight *= torch.exp2(torch.randint(-9, 6, (rows, 1), generator=draw).float())
    weight[-1, : columns // 3] = 0
    return weight


def every_code(fmt: GridFormat) -> QuantizedTensor:
    """All codes, that of -0 too, under every scale that is stored: powers of two, or positive numbers of E4M3."""
    if fmt.family == "mxfp4":
        scales = torch.exp2(torch.arange(-126, 125).float())  # 2^-126 is the least that is fitted
    else:
        scales = torch.arange(0x08, 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    rows, size = len(scales), fmt.group_size or 0
    codes = torch.arange(16, dtype=torch.uint8).repeat(rows, 4 * size // 16)
    params = {"scale": scales[:, None].repeat(1, 4)}
    if fmt.has_global:
        params["global_scale"] = torch.full_like(params["scale"], 123.456)
    return QuantizedTensor((rows, 4 * size), (Segment(fmt, codes, params),))


def float_format(name: str) -> GridFormat:
    fmt = parse_format(name)
    assert isinstance(fmt, GridFormat)
    return fmt


# -- gguf -----------------------------------------------------------------------------------------------------------


def by_gguf(tensor: QuantizedTensor, *, ternary: bool = False) -> tuple[str, np.ndarray]:
    """The type of a matrix, and its values as the package gguf reads them."""
    gguf = pytest.importorskip("gguf")
    tensor = as_integers(tensor)
    kind = block_type(tensor.segments[0].format, tensor.shape[1], ternary=ternary)
    assert not isinstance(kind, str), kind
    packed, rounded = to_blocks("w", tensor, kind)
    assert rounded == 0 and packed.shape == (tensor.shape[0], kind.row_bytes(tensor.shape[1]))
    known = gguf.GGMLQuantizationType[kind.name]
    assert (kind.columns, kind.nbytes) == gguf.GGML_QUANT_SIZES[known]
    return kind.name, gguf.quants.dequantize(packed, known)


@pytest.mark.parametrize(("name", "kind"), [
    ("ternary_g256", "TQ2_0"), ("ternary_g768", "TQ2_0"), ("ternary_row", "TQ2_0"), ("ternary_g256_b3", "TQ2_0"),
    ("ternary_g256", "TQ1_0"), ("ternary_row", "TQ1_0"), ("ternary_row_b3", "TQ1_0"),
])
def test_gguf_reads_ternary_formats(name: str, kind: str) -> None:
    tensor = quantized_by(parse_format(name), uneven())
    found, values = by_gguf(tensor, ternary=kind == TERNARY.name)
    assert found == kind and np.array_equal(values, tensor.dequantize().numpy())
    assert len(np.unique(np.sign(values))) == 3 and not values[-1, :256].any()


@pytest.mark.parametrize("importance", [False, True])
def test_gguf_reads_mxfp4(importance: bool) -> None:
    weights = torch.rand(_COLUMNS, generator=torch.Generator().manual_seed(1)) if importance else None
    tensor = quantized_by(float_format("mxfp4"), uneven(), weights)
    kind, values = by_gguf(tensor)
    assert kind == "MXFP4" and np.array_equal(values, tensor.dequantize().numpy())


def test_gguf_reads_every_code_and_scale_of_mxfp4() -> None:
    tensor = every_code(float_format("mxfp4"))
    assert np.array_equal(by_gguf(tensor)[1], tensor.dequantize().numpy())


@pytest.mark.parametrize("tensor", [quantized_by(float_format("nvfp4"), uneven()), every_code(float_format("nvfp4"))])
def test_gguf_reads_nvfp4_but_for_the_scale_of_the_tensor(tensor: QuantizedTensor) -> None:
    """Which llama.cpp multiplies the product by: exact in everything else."""
    kind, values = by_gguf(tensor)
    (segment,) = tensor.segments
    alone = Segment(segment.format, segment.codes, segment.params | {
        "global_scale": torch.ones_like(segment.params["global_scale"])})
    assert kind == "NVFP4" and np.array_equal(values, alone.dequantize().numpy())
    with_it = torch.from_numpy(values) * (1 / segment.params["global_scale"][0, 0])
    torch.testing.assert_close(with_it, tensor.dequantize(), rtol=2**-22, atol=0)


def test_the_own_quantizer_of_gguf_writes_our_bytes() -> None:
    """Of weights that are numbers of the format, whose largest is 6 scales, so that nothing is left to choose."""
    gguf = pytest.importorskip("gguf")
    draw = torch.Generator().manual_seed(0)
    exact = torch.randint(0, 16, (4, 24, 32), generator=draw)
    exact[..., 0] = 7
    scale = torch.exp2(torch.randint(-20, 20, (4, 24, 1), generator=draw).float())
    values = torch.tensor([*E2M1, *(-v for v in E2M1)])[exact] * scale
    tensor = quantized_by(float_format("mxfp4"), values.view(4, -1))
    theirs = gguf.quants.quantize(values.view(4, -1).numpy(), gguf.GGMLQuantizationType.MXFP4)
    assert np.array_equal(to_blocks("w", tensor, FLOATS["mxfp4"])[0], theirs)


@pytest.mark.parametrize(("name", "columns", "reason"), [
    ("nf4_g64", 768, "has no type for nf4_g64; quantize it as int4_sym_g32"),
    ("nf4_g16", 48, "has no type for nf4_g16; K = 48 is no multiple of 32, add it to keep"),
    ("bitmod4_g128", 768, "has no type for bitmod4_g128"),
    ("fp4_g32", 768, "has no type for fp4_g32"),
    ("binary2_g256", 768, "has no type for binary2_g256"),
    ("ternary_mean_g256", 768, "has no type for ternary_mean_g256"),
    ("ternary_g128", 768, "has no 2-bit type for groups of 128, its blocks have 256 columns; quantize it as "
                          "int2_sym_g256 or ternary_g256"),
    ("ternary_row", 640, "has no 2-bit type for groups of 640, .*K = 640 is no multiple of 256, quantize it as int4"),
    ("nvfp4", 96, "has blocks of 64 columns for nvfp4, got K = 96; quantize it as int4_sym_g32"),
    ("mxfp4", 768, None), ("nvfp4", 768, None), ("ternary_row", 768, None), ("ternary_g256_b3", 768, None),
])
def test_what_gguf_takes(name: str, columns: int, reason: str | None) -> None:
    target = Target("a.b", "a.b", "linear", "weight", None, (4, columns))
    layout = Layout.of(parse_format(name), columns)
    obstacle = Gguf().obstacle(target, layout)
    if reason is None:
        assert obstacle is None
    else:
        with pytest.raises(FormatError, match=reason):
            raise FormatError(obstacle or "taken")
    assert ENGINES["llama.cpp"].reads(layout) == (obstacle is None)


def test_an_embedding_in_nvfp4_is_refused_by_gguf() -> None:
    target = Target("model.embed_tokens", "model.embed_tokens", "embedding", "weight", None, (4, 64))
    assert "no scale of the whole tensor" in str(Gguf().obstacle(target, Layout.of(float_format("nvfp4"), 64)))
    assert Gguf().obstacle(target, Layout.of(float_format("mxfp4"), 64)) is None


# -- compressed-tensors ---------------------------------------------------------------------------------------------


def scheme_of(tensor: QuantizedTensor):
    """The scheme of a matrix by the configuration that the export writes, and what decodes it."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    fmt = tensor.segments[0].format
    assert isinstance(fmt, GridFormat)
    name = _compression(fmt)
    scheme = QuantizationScheme(targets=["Linear"], weights=_weights(fmt), format=name)
    return scheme, BaseCompressor.get_value_from_registry(name)


@pytest.mark.parametrize("tensor", [
    *(quantized_by(float_format(name), uneven(rows)) for name in ("mxfp4", "nvfp4") for rows in (1, 6)),
    *(every_code(float_format(name)) for name in ("mxfp4", "nvfp4")),
])
def test_compressed_tensors_reads_floats(tensor: QuantizedTensor) -> None:
    scheme, compressor = scheme_of(tensor)
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    packed = packed_tensors("w", tensor)
    assert set(packed) == set(compressor.compression_param_names(scheme))
    codes = unpack_fp4_from_uint8(packed["weight_packed"], *tensor.shape, dtype=torch.float32)
    scale = compressor._decompress_scale(packed["weight_scale"], torch.float32)
    found = dequantize(codes, scale, args=scheme.weights, global_scale=packed.get("weight_global_scale"),
                       dtype=torch.float32)
    assert torch.equal(found, tensor.dequantize())
    whole = compressor.decompress(packed, scheme)["weight"]  # which is of bfloat16
    assert torch.equal(whole, tensor.dequantize().to(whole.dtype))


def test_the_schemes_are_those_of_compressed_tensors() -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization.quant_scheme import MXFP4A16, NVFP4A16

    for name, preset in (("mxfp4", MXFP4A16), ("nvfp4", NVFP4A16)):
        scheme, _ = scheme_of(quantized_by(float_format(name), uneven()))
        ours, theirs = scheme.weights.model_dump(), preset["weights"].model_dump()
        same = ("num_bits", "type", "symmetric", "group_size", "strategy", "dynamic", "scale_dtype")
        assert {k: ours[k] for k in same} == {k: theirs[k] for k in same}


def without_minus_zero(packed: Tensor) -> Tensor:
    """Codes of bytes of two; -0 becomes 0, which is what we write."""
    codes = torch.stack([packed & 15, packed >> 4], -1).flatten(1)
    return codes.masked_fill(codes == 8, 0)


def test_compressed_tensors_writes_our_nvfp4() -> None:
    tensor = quantized_by(float_format("nvfp4"), weight := uneven())
    scheme, compressor = scheme_of(tensor)
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    packed, groups = packed_tensors("w", tensor), weight.view(_ROWS, -1, 16)
    whole = generate_gparam(weight.min(), weight.max())
    assert torch.equal(whole, packed["weight_global_scale"])
    scale, _ = calculate_qparams(groups.amin(-1), groups.amax(-1), scheme.weights, whole)
    ours = packed["weight_scale"].float()
    # they write subnormal scales, and 1/8 for zeros; we stop at the least that is not subnormal, as torchao does
    normal = (scale.float() >= 2**-6) & (groups != 0).any(-1)
    assert torch.equal(ours[normal], scale.float()[normal]) and bool((ours[~normal] == 2**-6).all())
    assert 0 < int((~normal).sum()) < normal.numel() / 4
    state = {"weight": weight, "weight_scale": ours, "weight_global_scale": whole}
    theirs = compressor.compress(state, scheme)
    assert torch.equal(theirs["weight_scale"].float(), ours)
    assert torch.equal(without_minus_zero(theirs["weight_packed"]), without_minus_zero(packed["weight_packed"]))
    assert not bool((tensor.segments[0].codes == 8).any())


def test_compressed_tensors_writes_our_mxfp4_for_our_scales() -> None:
    """Their scales round the largest weight to one bit first (7 or more takes the next power); ours are OCP's."""
    tensor = quantized_by(float_format("mxfp4"), weight := uneven())
    scheme, compressor = scheme_of(tensor)
    packed = packed_tensors("w", tensor)
    theirs = compressor.compress({"weight": weight, "weight_scale": tensor.segments[0].params["scale"]}, scheme)
    assert torch.equal(theirs["weight_scale"], packed["weight_scale"])
    assert torch.equal(without_minus_zero(theirs["weight_packed"]), without_minus_zero(packed["weight_packed"]))


@pytest.mark.parametrize(("name", "reason"), [
    ("nf4_g32", "takes integers alone; got nf4_g32"), ("fp4_g32", "takes integers alone; got fp4_g32"),
    ("ternary_mean_g32", "takes integers alone; got ternary_mean_g32"),
])
def test_what_compressed_tensors_refuses(name: str, reason: str) -> None:
    target = Target("a.b", "a.b", "linear", "weight", None, (4, 64))
    layout = Layout.of(parse_format(name), 64)
    assert reason in str(CompressedTensors().obstacle(target, layout))
    assert not ENGINES["transformers"].reads(layout)


# -- torchao --------------------------------------------------------------------------------------------------------


def torchao_modules():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="needs torchao, which is optional")
        nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    return mx, nv


@pytest.mark.parametrize("tensor", [quantized_by(float_format("mxfp4"), uneven()), every_code(float_format("mxfp4"))])
def test_torchao_reads_mxfp4(tensor: QuantizedTensor) -> None:
    mx, _ = torchao_modules()
    packed = packed_tensors("w", tensor)
    scale = packed["weight_scale"].view(torch.float8_e8m0fnu)
    found = mx.to_dtype(packed["weight_packed"], scale, torch.float4_e2m1fn_x2, 32, torch.float32)
    assert torch.equal(found, tensor.dequantize())


def test_torchao_writes_our_mxfp4() -> None:
    mx, _ = torchao_modules()
    tensor = quantized_by(float_format("mxfp4"), weight := uneven())
    scale, codes = mx.to_mx(weight, torch.float4_e2m1fn_x2, 32)
    packed = packed_tensors("w", tensor)
    ours, some = packed["weight_scale"], (weight.view(_ROWS, -1, 32) != 0).any(-1)
    assert torch.equal(scale.view(torch.uint8).view(_ROWS, -1)[some], ours[some])
    assert bool((ours[~some] == 127).all()) and not bool(some.all())  # theirs is 0: both have zeros alone
    assert torch.equal(without_minus_zero(codes.view(torch.uint8).view(_ROWS, -1)),
                       without_minus_zero(packed["weight_packed"]))


def test_torchao_reads_nvfp4() -> None:
    """It stores the inverse of our scale of the tensor: powers of two are exact there, others to float32's rounding."""
    _, nv = torchao_modules()
    made = quantized_by(float_format("nvfp4"), uneven())
    for whole, exact in ((2.0**11, True), (float(made.segments[0].params["global_scale"][0, 0]), False)):
        (segment,) = made.segments
        params = segment.params | {"global_scale": torch.full_like(segment.params["global_scale"], whole)}
        tensor = QuantizedTensor(made.shape, (dataclasses.replace(segment, params=params),))
        packed = packed_tensors("w", tensor)
        found = nv.NVFP4Tensor(packed["weight_packed"], packed["weight_scale"], 16, torch.float32,
                               1 / packed["weight_global_scale"][0]).dequantize(torch.float32)
        torch.testing.assert_close(found, tensor.dequantize(), rtol=0 if exact else 2**-22, atol=0)


def test_torchao_writes_our_nvfp4() -> None:
    _, nv = torchao_modules()
    tensor = quantized_by(float_format("nvfp4"), weight := uneven())
    packed = packed_tensors("w", tensor)
    whole = nv.per_tensor_amax_to_scale(weight.abs().amax())
    torch.testing.assert_close(1 / whole, packed["weight_global_scale"][0], rtol=2**-22, atol=0)
    scale, codes = nv.nvfp4_quantize(weight, 16, 1 / packed["weight_global_scale"][0])
    assert torch.equal(scale.float().view(_ROWS, -1), packed["weight_scale"].float())
    assert torch.equal(without_minus_zero(codes.view(torch.uint8).view(_ROWS, -1)),
                       without_minus_zero(packed["weight_packed"]))


# -- by hand --------------------------------------------------------------------------------------------------------


def test_packed_trits_by_hand() -> None:
    five = torch.tensor([[1, -1, 0, 0, 1]])  # digits 2 0 1 1 2 in base 3 are 176, of which ggml stores 176 * 256 / 243
    assert pack_trits((five + 1).to(torch.uint8)).tolist() == [[186]]
    sixteen = torch.tensor([[1, -1, 0, 1, 0, 0, -1, 1, 1, 1, -1, -1, 0, 1, 0, -1]])
    assert pack_rows((sixteen + 1).to(torch.uint8), 2).tolist() == [[0x190A8592]]
    # a byte of TQ1_0 has the columns 32 apart, and one of TQ2_0 too, the first in its lowest bits
    codes = torch.ones(1, 256, dtype=torch.uint8)
    codes[0, :160:32] = (five[0] + 1).to(torch.uint8)
    one = Segment(parse_format("ternary_g256"), codes, {"scale": torch.ones(1, 1).half()})
    integers = as_integers(QuantizedTensor((1, 256), (one,)))
    for ternary, first in ((True, 186), (False, 0b01_01_10_00)):  # TQ2_0 counts downwards, under the scale -1
        kind = block_type(integers.segments[0].format, 256, ternary=ternary)
        assert not isinstance(kind, str) and int(to_blocks("w", integers, kind)[0][0, 0]) == first


def test_mxfp4_by_hand() -> None:
    weight = torch.tensor([0.9, -0.4, 0.1, -1.3, 0.05, 0.7, -0.2, 0.3])
    tensor = quantized_by(float_format("mxfp4"), torch.nn.functional.pad(weight, (0, 24))[None])
    found = tensor.dequantize()[0]
    assert float(tensor.segments[0].params["scale"]) == 0.25
    assert (found[:8] / 0.25).tolist() == [4, -1.5, 0.5, -6, 0, 3, -1, 1] and not found[8:].any()
    assert float((found[:8] - weight).square().sum()) == pytest.approx(0.061250, abs=1e-6)
    packed = packed_tensors("w", tensor)
    assert packed["weight_scale"].tolist() == [[125]]
    # low halves first; signs in the highest bit: 4 is 6, -1.5 is 8 + 3, 0.5 is 1, -6 is 8 + 7, and so on
    assert packed["weight_packed"][0, :4].tolist() == [0xB6, 0xF1, 0x50, 0x2A]
    assert not packed["weight_packed"][0, 4:].any()


@pytest.mark.parametrize(("name", "scale"), [("mxfp4", 1.0), ("nvfp4", 1.0), ("fp4_g32", 1.0)])
def test_ties_go_to_even_codes(name: str, scale: float) -> None:
    fmt = float_format(name)
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 7.9])
    params = {"scale": torch.tensor([scale])} | ({"global_scale": torch.ones(1)} if fmt.has_global else {})
    for sign in (1, -1):
        found = fmt.decode(fmt.encode(sign * ties, params), params)
        assert found.tolist() == [sign * v for v in (0, 1, 1, 2, 2, 4, 4, 6, 6)]


def test_the_largest_weight_of_mxfp4_may_be_clipped() -> None:
    """OCP's scale is the largest power of two in the largest weight, over 4: of 7.9 it is 1, which leaves 6."""
    found = quantized_by(float_format("mxfp4"), torch.tensor([[7.9] + [0.0] * 31, [8.0] + [0.0] * 31]))
    assert found.segments[0].params["scale"].tolist() == [[1], [2]]
    assert found.dequantize()[:, 0].tolist() == [6, 8]
    # with an importance a scale that does not clip is found: 7.9 is nearer to 8
    found = quantized_by(float_format("mxfp4"), torch.tensor([[7.9] + [0.0] * 31]), torch.ones(32))
    assert float(found.dequantize()[0, 0]) == 8


def test_scales_of_nvfp4_round_to_even_and_stop_at_the_least_normal_number() -> None:
    largest = 448 * 6
    # of the tensor's scale 1, a group's is its largest weight over 6: E4M3 near 16 has steps of 2
    groups = {6 * 17.0: 16, 6 * 19.0: 20, 6 * 18.9: 18, 6 * 2.0**-6: 2**-6, 6 * 2.0**-7: 2**-6, largest: 448, 0: 2**-6}
    weight = torch.zeros(len(groups), 16)
    weight[:, 3] = torch.tensor(list(groups))
    tensor = quantized_by(float_format("nvfp4"), weight)
    assert float(tensor.segments[0].params["global_scale"][0, 0]) == 1
    assert tensor.segments[0].params["scale"][:, 0].tolist() == list(groups.values())
    assert float(tensor.dequantize()[4, 3]) == 3 * 2.0**-6 and not tensor.dequantize()[6].any()


def test_all_zeros() -> None:
    for name in ("mxfp4", "nvfp4"):
        tensor = quantized_by(float_format(name), torch.zeros(2, 64))
        packed = packed_tensors("w", tensor)
        assert not packed["weight_packed"].any() and not tensor.dequantize().any()
        assert all(bool(t.float().isfinite().all()) for t in packed.values())

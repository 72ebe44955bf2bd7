"""Kernels of trellis codes against what the format says they mean, and modules that hold a rotated weight."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from fewbits.kernels import trellis
from fewbits.kernels.cpu import trellis as cpu
from fewbits.kernels.linear import PackedMatrix, QuantLinear
from fewbits.kernels.trellis import TRELLIS_KERNELS
from fewbits.quant.errors import FormatError
from fewbits.quant.formats import parse_layout
from fewbits.quant.formats.trellis import TrellisFormat
from fewbits.quant.quantizers import RTN

SHAPES = [(32, 8), (96, 72), (64, 264)]


def packed(fmt: TrellisFormat, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Random codes as they are stored, and the float64 weight that they mean."""
    draw = torch.Generator().manual_seed(rows)
    codes = torch.randint(0, 1 << fmt.code_bits, (rows, columns), generator=draw, dtype=torch.uint8)
    return fmt.pack(codes, {})["weight_trellis"], fmt.decode(codes, {}).double()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("code_bits", [1, 2, 3, 4])
@pytest.mark.parametrize("name", list(TRELLIS_KERNELS))
def test_matches_the_format(name: str, code_bits: int, dtype: torch.dtype) -> None:
    kernel = TRELLIS_KERNELS[name]
    if not kernel.available():
        pytest.skip(f"{name} cannot run here (no compiler or no Triton)")
    device = "cuda" if kernel.device == "cuda" and torch.cuda.is_available() else "cpu"
    slow = device == "cpu" and name.startswith("triton")  # in the interpreter
    for state_bits, (rows, columns) in zip((16, 12, 11), SHAPES):
        fmt = TrellisFormat(code_bits, state_bits)
        words, weight = packed(fmt, rows, columns)
        for tokens in (1, 17) if slow else (1, 2, 3, 7, 33):
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(device, dtype)
            y = kernel.run(x, words.to(device), code_bits, state_bits, fmt.step).cpu().double()
            exact = x.cpu().double() @ weight.T
            terms = x.cpu().double().abs() @ weight.abs().T
            # of weights and outputs; Triton's interpreter cuts bfloat16 off instead of rounding it
            rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 0}[dtype]
            assert y.shape == (tokens, rows)
            assert bool(((y - exact).abs() <= terms * (columns + 16) * 2.0**-24 + terms * rounding + 1e-12).all())


@pytest.mark.parametrize("name", ["gemv", "gemm"])
def test_split_columns_add_up(name: str) -> None:
    triton_trellis = pytest.importorskip("fewbits.kernels.triton_trellis")
    fmt = TrellisFormat(3)
    words, weight = packed(fmt, 64, 264)
    x = torch.randn(2, 264)
    for split in (1, 2, 3):
        y = getattr(triton_trellis, name)(x, words, 3, fmt.state_bits, fmt.step, split)
        torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not cpu.available(), reason="no C compiler")
@pytest.mark.parametrize("state_bits", [10, 12, 16])
@pytest.mark.parametrize("code_bits", [1, 2, 3, 4])
def test_compiled_rows_are_exact_and_do_not_depend_on_threads(code_bits: int, state_bits: int) -> None:
    fmt = TrellisFormat(code_bits, state_bits)
    words, weight = packed(fmt, 96, 72)
    assert torch.equal(cpu.dequantize(words, code_bits, state_bits, fmt.step).double(), weight)
    x = torch.randn(5, 72)
    one = cpu.gemv(x, words, code_bits, state_bits, fmt.step)
    torch.set_num_threads(2)
    assert torch.equal(cpu.gemv(x, words, code_bits, state_bits, fmt.step), one)
    assert torch.equal(cpu.gemv(x[2:3], words, code_bits, state_bits, fmt.step), one[2:3])


def test_the_operator_is_opaque_and_has_a_gradient() -> None:
    fmt = TrellisFormat(2)
    words, weight = packed(fmt, 64, 72)
    torch.library.opcheck(torch.ops.fewbits.trellis_matmul.default, (torch.randn(3, 72), words, 2, 12))
    torch.library.opcheck(torch.ops.fewbits.trellis_dequantize.default, (words, 2, 12))
    x = torch.randn(2, 3, 72, requires_grad=True)
    trellis.matmul(x, words, fmt).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), weight.sum(0).expand(2, 3, -1), rtol=1e-4, atol=1e-4)


LAYOUTS = ["trellis2", "trellis2[32]+trellis3[64]", "had:int4_g32", "perm:trellis4"]


def linear(name: str, dtype: torch.dtype = torch.float32) -> tuple[QuantLinear, Tensor]:
    layout = parse_layout(name, 96)
    if layout.permuted:
        made, _ = RTN().quantize(torch.randn(64, 96), None, parse_layout(name.removeprefix("perm:"), 96))
        made = type(made)(made.shape, made.segments, torch.randperm(96), made.rotation)
    else:
        made, _ = RTN().quantize(torch.randn(64, 96), None, layout)
    module = QuantLinear(layout, (64, 96), bias=False, dtype=dtype)
    module.assign(made.pack())
    return module, made.dequantize()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_module_multiplies_by_the_dequantized_weight(name: str) -> None:
    module, weight = linear(name)
    torch.testing.assert_close(module.weight.dense(), weight, rtol=1e-6, atol=1e-6)
    for tokens in (1, 40):
        x = torch.randn(tokens, 96)
        torch.testing.assert_close(module(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    half = copy.deepcopy(module).to(torch.bfloat16)
    assert half(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), x.bfloat16().float() @ weight.T, rtol=0.02, atol=0.05)
    assert torch.equal(half.packed_tensors()["weight_in_scale"], module.packed_tensors()["weight_in_scale"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_compiled_module(name: str) -> None:
    module, _ = linear(name)
    x = torch.randn(3, 96)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    module.prepared()
    torch.testing.assert_close(compiled(x), module(x))


def test_scales_that_are_none_are_refused_at_first_use() -> None:
    module, _ = linear("trellis2")
    broken = {k: v.clone() for k, v in module.packed_tensors().items()}
    broken["weight_out_scale"][7] = float("inf")
    module = PackedMatrix(module.layout, (64, 96), dtype=torch.float32)
    module.assign(broken)
    with pytest.raises(FormatError, match="weight_out_scale: got 0, NaN or Inf"):
        module.prepared()

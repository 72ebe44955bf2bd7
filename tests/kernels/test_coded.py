"""Kernels of jointly coded formats against what the formats mean, and modules that hold a rotated weight."""

from __future__ import annotations

import copy
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from fewbits.kernels import coded
from fewbits.kernels.coded import CODED_KERNELS, FAMILIES
from fewbits.kernels.cpu import trellis
from fewbits.kernels.linear import PackedMatrix, QuantLinear
from fewbits.quant.errors import FormatError
from fewbits.quant.formats import parse_format, parse_layout
from fewbits.quant.quantizers import RTN
from fewbits.quant.types import Format

SHAPES = [(32, 8), (96, 72), (64, 264), (48, 96)]
NAMES = ["trellis1_l16", "trellis2_l11", "trellis3", "trellis4_l16", "rvq2", "rvq3", "rvq4", "pvq2", "pvq3", "pvq4",
         "vq8_v4", "vq8x2_v8", "vq9x3_v2", "vq12_v2", "vq12_v6", "vq8_v16", "pq8_v8", "pq9_v4", "pq12_v32",
         "lrvq8_v4_d3", "fairy1", "fairy2", "fairy3"]


def shapes(fmt: Format) -> list[tuple[int, int]]:
    return [(rows, columns) for rows, columns in SHAPES if rows % fmt.height == 0 and columns % fmt.span == 0]


@lru_cache(maxsize=128)
def packed(fmt: Format, rows: int, columns: int) -> tuple[coded.Operands, Tensor]:
    """Of normal values: what kernels read, and the float64 weight that it means."""
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
    params = fmt.fit(values, None)
    codes = fmt.encode(values, params)
    return coded.operands(fmt, fmt.pack(codes, params), rows, columns), fmt.decode(codes, params).double()


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "kernel"), [
    (f, k) for f in NAMES for k, found in CODED_KERNELS.items()
    if found.takes(parse_format(f))
])
def test_matches_the_format(name: str, kernel: str, dtype: torch.dtype) -> None:
    fmt, found = parse_format(name), CODED_KERNELS[kernel]
    if not found.available():
        pytest.skip(f"{kernel} cannot run here (no compiler or no Triton)")
    device = "cuda" if found.device == "cuda" and torch.cuda.is_available() else "cpu"
    slow = device == "cpu" and kernel.startswith("triton")  # in the interpreter
    for rows, columns in shapes(fmt)[-2:] if slow else shapes(fmt):
        stored, weight = packed(fmt, rows, columns)
        for tokens in (1, 2, 3, 7, 33) if not slow else (1, 3) if found.max_tokens else (1, 3, 17):
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1)).to(device, dtype)
            y = found.run(x, [t.to(device) for t in stored], fmt).cpu().double()
            exact = x.cpu().double() @ weight.T
            terms = x.cpu().double().abs() @ weight.abs().T
            # of weights and outputs; Triton's interpreter cuts bfloat16 off instead of rounding it
            rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 0}[dtype]
            assert y.shape == (tokens, rows)
            assert bool(((y - exact).abs() <= terms * (columns + 16) * 2.0**-23 + terms * rounding + 1e-12).all())


@pytest.mark.parametrize("name", ["gemv", "gemm"])
@pytest.mark.parametrize("family", ["trellis", "rvq", "pvq"])
def test_split_columns_add_up(family: str, name: str) -> None:
    kernels = pytest.importorskip(f"fewbits.kernels.triton_{'vectors' if family == 'rvq' else family}")
    fmt = parse_format(f"{family}3")
    words, weight = packed(fmt, 64, 264)
    x, more = torch.randn(2, 264), [fmt] if family == "trellis" else []
    for split in (1, 2, 3):
        y = getattr(kernels, name)(x, *words, *more, split)
        torch.testing.assert_close(y.double(), x.double() @ weight.T, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not trellis.available(), reason="no C compiler")
@pytest.mark.parametrize("name", [*NAMES, "trellis1_l10", "trellis4_l10"])
def test_compiled_rows_are_exact_and_do_not_depend_on_threads(name: str) -> None:
    fmt = parse_format(name)
    rows, columns = shapes(fmt)[-1]
    stored, weight = packed(fmt, rows, columns)
    if coded.select(fmt, 1, "cpu") == "coded_reference":
        pytest.skip("its vectors are not 2, 4 or 8 high")
    assert torch.equal(FAMILIES[type(fmt)].compiled(stored, fmt).double(), weight)
    kernel, x = CODED_KERNELS[coded.select(fmt, 1, "cpu")], torch.randn(5, columns)
    if kernel.max_tokens is None:
        pytest.skip("torch multiplies by its dense copy")
    one = kernel.run(x, stored, fmt)
    torch.set_num_threads(2)
    assert torch.equal(kernel.run(x, stored, fmt), one)
    assert torch.equal(kernel.run(x[2:3], stored, fmt), one[2:3])


@pytest.mark.skipif(not trellis.available(), reason="no C compiler")
@pytest.mark.parametrize(("name", "kernel"), [
    ("pq8_v8", "cpu_row_gemv"), ("lrvq12_v4_d2", "cpu_row_gemv"), ("lrvq13_v4_d2", "cpu_row_dense"),
    ("pq16_v64", "cpu_row_gemv"), ("vq8_v4", "cpu_vector_gemv"), ("vq12_v6", "coded_reference"),
    ("fairy2", "cpu_fairy_gemv"), ("fairy3", "cpu_fairy_dense"),
])
def test_tables_that_outgrow_a_weight_are_not_made(name: str, kernel: str) -> None:
    assert coded.select(parse_format(name), 1, "cpu") == kernel


@pytest.mark.parametrize("name", ["trellis2", "rvq2", "pvq2", "vq8_v4", "pq8_v8", "fairy2"])
def test_the_operator_is_opaque_and_has_a_gradient(name: str) -> None:
    fmt = parse_format(name)
    stored, weight = packed(fmt, 64, 72)
    torch.library.opcheck(torch.ops.fewbits.coded_matmul.default, (torch.randn(3, 72), stored, name))
    torch.library.opcheck(torch.ops.fewbits.coded_dequantize.default, (stored, name))
    x = torch.randn(2, 3, 72, requires_grad=True)
    coded.matmul(x, stored, fmt).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), weight.sum(0).expand(2, 3, -1), rtol=1e-4, atol=1e-4)


LAYOUTS = ["trellis2", "rvq3", "pvq2", "trellis2[32]+trellis3[64]", "had:int4_g32", "perm:trellis4", "had:fairy2"]


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
    torch.compiler.reset()  # a function may only be compiled so often, and other tests do it too
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

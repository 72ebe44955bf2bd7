"""The change of basis of activations: Triton against float64, operators against ``quant/rotation.py``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fewbits.kernels.linear import QuantLinear
from fewbits.kernels.rotation import rotate_in, rotate_out
from fewbits.quant.formats import parse_layout
from fewbits.quant.quantizers import RTN
from fewbits.quant.rotation import Rotation, block_size, hadamard, rotate_columns, rotate_rows_back

SIZES = [576, 1536, 128, 48]
"""Blocks of 64, 128, 128 and 16; one, three and less than one program for a token."""

TOKENS = [1, 3, 17]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def outliers(*shape: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(*shape)
    x[..., 5], x[..., -1] = 1e4, -1e4
    return x.to(dtype)


def rotation(columns: int, rows: int) -> Rotation:
    """With scales of both signs within a factor of two of one."""
    scales = [(torch.rand(n) + 0.5) * torch.randn(n).sign() for n in (columns, rows)]
    return Rotation(*scales, row_block=block_size(rows), column_block=block_size(len(scales[0])))


def assert_float32_accuracy(got: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Within the rounding of float32 of the sizes added up, ``terms``, and that of the result."""
    # Triton's interpreter cuts bfloat16 off instead of rounding it
    rounding = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 0}[got.dtype]
    assert got.shape == exact.shape
    # seven butterflies, two scales and a bias round once each; float16 has a smallest number
    assert bool(((got.double() - exact).abs() <= terms * 10 * 2.0**-24 + exact.abs() * rounding + 2.0**-24).all())


@pytest.mark.usefixtures("poisoned_empty")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("size", SIZES)
def test_triton_keeps_float32_accuracy_of_outliers(size: int, tokens: int, dtype: torch.dtype) -> None:
    kernels = pytest.importorskip("fewbits.kernels.triton_rotation")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, scale, bias = outliers(tokens, size, dtype=dtype), rotation(size, size).in_scale, torch.randn(size).to(dtype)
    wide, block = x.double(), block_size(size)
    on = [t.to(device) for t in (x, scale)]
    for out in {dtype, torch.float32}:
        into = kernels.rotate_in(*on, block, out).cpu()
        sizes = hadamard_sizes(wide * scale, block)
        assert_float32_accuracy(into, hadamard(wide * scale.double(), block), sizes)
        for b in (None, bias):
            got = kernels.rotate_out(*on, block, out, None if b is None else b.to(device)).cpu()
            added = 0 if b is None else b.double()
            sizes = hadamard_sizes(wide, block) * scale.double().abs() + abs(added)
            assert_float32_accuracy(got, hadamard(wide, block) * scale.double() + added, sizes)


def hadamard_sizes(x: Tensor, block: int) -> Tensor:
    """What each transformed value is the sum of, without signs."""
    total = x.double().abs().unflatten(-1, (-1, block)).sum(-1, keepdim=True) / block**0.5
    return total.expand(*total.shape[:-1], block).flatten(-2)


def test_triton_takes_any_strides_and_no_tokens() -> None:
    kernels = pytest.importorskip("fewbits.kernels.triton_rotation")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scale = rotation(96, 96).in_scale.to(device)
    for x in (torch.randn(96, 5).T, torch.randn(2, 3, 200)[..., 4:100], torch.randn(96), torch.randn(0, 96)):
        x = x.to(device)
        exact = hadamard(x * scale, 32)
        torch.testing.assert_close(kernels.rotate_in(x, scale, 32, torch.float32), exact, rtol=1e-5, atol=1e-5)
        exact = hadamard(x, 32) * scale
        torch.testing.assert_close(kernels.rotate_out(x, scale, 32, torch.float32, None), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_operators_are_the_rotation_and_its_gradient(dtype: torch.dtype) -> None:
    basis = rotation(48, 96)
    x, y = outliers(2, 3, 48, dtype=dtype), torch.randn(96, 5).T
    bias = torch.randn(96, dtype=dtype)
    for f, reference, argument in [
        (lambda t: rotate_in(t, basis, torch.float32), lambda t: rotate_columns(t, basis), x),
        (lambda t: rotate_out(t, basis, dtype), lambda t: rotate_rows_back(t, basis).to(dtype), y),
    ]:
        assert torch.equal(f(argument), reference(argument))
        a, b = (argument.clone().requires_grad_() for _ in range(2))
        f(a).square().sum().backward()
        reference(b).square().sum().backward()
        assert a.grad is not None and a.grad.dtype == argument.dtype
        torch.testing.assert_close(a.grad, b.grad)
    bias.requires_grad_()
    made = rotate_out(y, basis, dtype, bias)
    assert torch.equal(made, rotate_rows_back(y, basis).to(dtype) + bias)
    made.sum().backward()
    assert torch.equal(bias.grad, torch.full((96,), 5.0, dtype=dtype))


def test_operators_are_opaque() -> None:
    basis, x = rotation(48, 96), torch.randn(2, 3, 48)
    args = (basis.in_scale, 16, torch.bfloat16)
    torch.library.opcheck(torch.ops.fewbits.rotate_in.default, (x, *args))
    for bias in (None, torch.randn(48)):
        torch.library.opcheck(torch.ops.fewbits.rotate_out.default, (x[:, 1], *args, bias))


@pytest.mark.parametrize("name", ["trellis2", "trellis2[32]+trellis3[64]", "int4_g32"])
def test_a_bias_is_added_once_and_learns(name: str) -> None:
    layout = parse_layout(name, 96)
    made, _ = RTN().quantize(torch.randn(64, 96), None, layout)
    module = QuantLinear(layout, (64, 96), bias=True, dtype=torch.float32)
    module.assign(made.pack())
    module.bias = torch.nn.Parameter(torch.randn(64))
    x = torch.randn(3, 96)
    torch.testing.assert_close(module(x), x @ made.dequantize().T + module.bias, rtol=1e-4, atol=1e-4)
    assert torch.equal(module(x), module.project(x) + module.bias)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))
    module(x).sum().backward()
    assert torch.equal(module.bias.grad, torch.full((64,), 3.0))

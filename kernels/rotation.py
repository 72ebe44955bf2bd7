"""The change of basis of activations on both sides of a product, and the choice of who computes it.

As torch operators that take flat tensors, ``fewbits::rotate_in`` and ``fewbits::rotate_out``, opaque to
``torch.compile`` and CUDA graphs. A Hadamard matrix is its own transpose: each is the other's gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels.choice import from_triton, has_triton
from fewbits.quant.rotation import Rotation, hadamard

_LIB = torch.library.Library("fewbits", "FRAGMENT")
_LIB.define("rotate_in(Tensor x, Tensor scale, int block, ScalarType dtype) -> Tensor",
            tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define("rotate_out(Tensor y, Tensor scale, int block, ScalarType dtype, Tensor? bias) -> Tensor",
            tags=(torch.Tag.pt2_compliant_tag,))

_triton_in, _triton_out = from_triton("triton_rotation", "rotate_in"), from_triton("triton_rotation", "rotate_out")


def _rotate_in(x: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    if x.is_cuda and has_triton():
        return _triton_in(x, scale, block, dtype)
    return hadamard(x.float() * scale, block).to(dtype)


def _rotate_out(y: Tensor, scale: Tensor, block: int, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    if y.is_cuda and has_triton():
        return _triton_out(y, scale, block, dtype, bias)
    out = (hadamard(y.float(), block) * scale).to(dtype)
    return out if bias is None else out + bias.to(dtype)


_LIB.impl("rotate_in", _rotate_in, "CompositeExplicitAutograd")
_LIB.impl("rotate_out", _rotate_out, "CompositeExplicitAutograd")


@torch.library.register_fake("fewbits::rotate_in", lib=_LIB)
def _fake_in(x: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


@torch.library.register_fake("fewbits::rotate_out", lib=_LIB)
def _fake_out(y: Tensor, scale: Tensor, block: int, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    return y.new_empty(y.shape, dtype=dtype)


_IN = torch.ops.fewbits.rotate_in.default
_OUT = torch.ops.fewbits.rotate_out.default


class _DifferentiableIn(torch.autograd.Function):
    """With a gradient for ``x``: scales are frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.block, ctx.dtype = block, x.dtype
        return _IN(x, scale, block, dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return _OUT(grad, *ctx.saved_tensors, ctx.block, ctx.dtype, None), None, None, None


class _DifferentiableOut(torch.autograd.Function):
    """With gradients for ``y`` and ``bias``."""

    @staticmethod
    def forward(ctx, y: Tensor, scale: Tensor, block: int, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(scale)
        ctx.block, ctx.dtype, ctx.bias_dtype = block, y.dtype, None if bias is None else bias.dtype
        return _OUT(y, scale, block, dtype, bias)

    @staticmethod
    def backward(ctx, grad: Tensor):
        of_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if ctx.needs_input_grad[4] else None
        return _IN(grad, *ctx.saved_tensors, ctx.block, ctx.dtype), None, None, None, of_bias


def rotate_in(x: Tensor, rotation: Rotation, dtype: torch.dtype) -> Tensor:
    """``x (..., K)`` as the coded matrix reads it, ``R_K (in_scale * x)``: float32, rounded to ``dtype``."""
    scale, block = rotation.in_scale, rotation.column_block
    if x.requires_grad and torch.is_grad_enabled():
        return _DifferentiableIn.apply(x, scale, block, dtype)
    return _IN(x, scale, block, dtype)


def rotate_out(y: Tensor, rotation: Rotation, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """What the coded matrix made, ``y (..., N)``, as the weight would have made it, as ``dtype``; and ``bias (N,)``."""
    scale, block = rotation.out_scale, rotation.row_block
    if torch.is_grad_enabled() and (y.requires_grad or (bias is not None and bias.requires_grad)):
        return _DifferentiableOut.apply(y, scale, block, dtype, bias)
    return _OUT(y, scale, block, dtype, bias)

"""Triton kernels for the change of basis of activations (``quant/rotation.py``): one launch on each side of a product.

A block is transformed by butterflies, not by a product with a matrix: ``log2(B)`` additions a value in float32, as
accurate as float32 is whatever the outliers, where matrix units would round. Shapes: M tokens, N values of a token.

The outputs have a launch of their own. A block of them is 128 whole sums, and where the time of a launch counts, for a
few tokens, no program has any: the gemv makes 32 rows, and all kernels split the columns then, so that sums are whole
only after partial products are added. A gemm of so many tokens that nothing is split could transform its tile of 128
rows, and compiles for that without spills; but it is bound by arithmetic then, and the pass that it would save is not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

VALUES = 512
"""Of a token in a program, which is one warp, so that no butterfly waits at a barrier."""


@triton.jit
def _hadamard(x, BLOCK: tl.constexpr):
    """``x (n)`` float32 with each run of ``BLOCK`` values transformed: times ``BLOCK ** -0.5``, orthonormal.

    Neighbours meet, and sums go to the first half of a block, differences to the second: the lowest bit of an index
    becomes the highest, so that all steps are alike and the last leaves every value in its place.
    """
    for _ in tl.static_range(BLOCK.bit_length() - 1):
        a, b = tl.split(tl.reshape(x, (x.numel // BLOCK, BLOCK // 2, 2)))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (x.numel,))
    return x * (BLOCK**-0.5)


@triton.jit
def rotate_in_kernel(p_x, p_s, p_y, N, BLOCK: tl.constexpr, b_n: tl.constexpr):
    """``y = H (scale * x)`` of ``x (M, N)``: ``b_n`` values of a token in a program."""
    o_n = tl.program_id(1) * b_n + tl.arange(0, b_n)
    o = tl.program_id(0).to(tl.int64) * N + o_n
    x = tl.load(p_x + o, mask=o_n < N, other=0).to(tl.float32) * tl.load(p_s + o_n, mask=o_n < N, other=0)
    tl.store(p_y + o, _hadamard(x, BLOCK).to(p_y.dtype.element_ty), mask=o_n < N)


@triton.jit
def rotate_out_kernel(p_x, p_s, p_b, p_y, N, BLOCK: tl.constexpr, BIAS: tl.constexpr, b_n: tl.constexpr):
    """``y = scale * (H x) + bias`` of ``x (M, N)``: ``b_n`` values of a token in a program."""
    o_n = tl.program_id(1) * b_n + tl.arange(0, b_n)
    o = tl.program_id(0).to(tl.int64) * N + o_n
    x = tl.load(p_x + o, mask=o_n < N, other=0).to(tl.float32)
    y = _hadamard(x, BLOCK) * tl.load(p_s + o_n, mask=o_n < N, other=0)
    if BIAS:
        y += tl.load(p_b + o_n, mask=o_n < N, other=0).to(tl.float32)
    tl.store(p_y + o, y.to(p_y.dtype.element_ty), mask=o_n < N)


# -- launching --------------------------------------------------------------------------------------------------


def rotate_in(x: Tensor, scale: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """``R_N (scale * x)`` as ``dtype``, of ``x (..., N)`` and ``scale (N,)``, in blocks of ``block``."""
    x, y, grid = _prepare(x, dtype)
    rotate_in_kernel[grid](x, scale, y, x.shape[-1], BLOCK=block, b_n=VALUES, num_warps=1)
    return y


def rotate_out(x: Tensor, scale: Tensor, block: int, dtype: torch.dtype, bias: Tensor | None) -> Tensor:
    """``scale * (R_N x) + bias`` as ``dtype``, of ``x (..., N)``, ``scale (N,)`` and ``bias (N,)``."""
    x, y, grid = _prepare(x, dtype)
    rotate_out_kernel[grid](x, scale, scale if bias is None else bias, y, x.shape[-1], BLOCK=block,
                            BIAS=bias is not None, b_n=VALUES, num_warps=1)
    return y


def _prepare(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """``x`` with its tokens one after another, room for the result, and the programs that fill it."""
    grid = x.numel() // x.shape[-1], triton.cdiv(x.shape[-1], VALUES)
    return x.contiguous(), torch.empty(x.shape, dtype=dtype, device=x.device), grid

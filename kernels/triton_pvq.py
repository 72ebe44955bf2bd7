"""Triton kernels for pyramid vectors (``quant/formats/pvq.py``): one for a few tokens, one for many.

They read points ``(N / 16, K, 16)`` int8, not ranks, and what a pulse is worth, float32 ``(N / 16, K)``: a thread loads
the 16 bytes of a vector at once, and one scale for them. A byte becomes a float as in ``triton_int.py``: a conversion
instruction has a quarter of the rate of an addition. Tiles were chosen from compiled code, as there.
Shapes: M tokens, N rows, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.triton_int import INTERPRET, WARP, Tile, split_product, store_tile, tile_for, tokens_of
from fewbits.quant.formats.pvq import PVQFormat

HEIGHT = PVQFormat.height
GEMV_TILE = Tile(b_m=1, b_n=32, b_k=64, warps=4, stages=2)
GEMM_TILES = (
    (16, Tile(b_m=16, b_n=64, b_k=64, warps=4, stages=3)),
    (None, Tile(b_m=64, b_n=64, b_k=64, warps=4, stages=3)),
)
"""Largest M -> tile; the last takes the rest."""


@triton.jit
def _vectors(p_w, o_column, m_c):
    """float32 ``(b_v, b_k, 16)``, exactly: the points at ``o_column (b_v, b_k)``, of which ``m_c (b_k)`` exist."""
    p_word = p_w.to(tl.pointer_type(tl.uint32)) + (o_column * 4)[:, :, None] + tl.arange(0, 4)
    raw = tl.load(p_word, mask=m_c[None, :, None], other=0) ^ 0x80808080  # bytes of two's complement, plus 128
    raw = tl.join(tl.join(raw, raw >> 16), tl.join(raw >> 8, raw >> 24))
    magic = tl.reshape(raw & 0xFF, (o_column.shape[0], o_column.shape[1], 16)) | 0x4B000000
    return magic.to(tl.float32, bitcast=True) - (8388608.0 + 128.0)


@triton.jit
def pvq_gemv(p_x, p_w, p_s, p_y, N, K, steps, s_xm, s_ym, s_ys, b_n: tl.constexpr, b_k: tl.constexpr):
    """``y[split] (M, N) = x (M, K) @ W.T`` for a token or two: ``b_n`` rows in a program, float32 throughout."""
    token = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * (b_n // 16) + tl.arange(0, b_n // 16)
    o_row = tl.minimum(o_v, N // 16 - 1).to(tl.int64)[:, None] * K
    acc = tl.zeros((b_n // 16, b_k, 16), tl.float32)
    first = tl.program_id(2) * steps
    for i in range(first, first + steps):
        o_c = i * b_k + tl.arange(0, b_k)
        m_c = o_c < K
        o_column = o_row + o_c[None, :]
        x = tl.load(p_x + token * s_xm + o_c, mask=m_c, other=0).to(tl.float32)
        part = x[None, :] * tl.load(p_s + o_column, mask=m_c[None, :], other=0)
        acc += _vectors(p_w, o_column, m_c) * part[:, :, None]
    o_n = o_v[:, None] * 16 + tl.arange(0, 16)[None, :]
    p_out = p_y + tl.program_id(2).to(tl.int64) * s_ys + token * s_ym + o_n
    tl.store(p_out, tl.sum(acc, axis=1).to(p_y.dtype.element_ty), mask=o_n < N)


@triton.jit
def pvq_gemm(p_x, p_w, p_s, p_y, M, N, K, steps, s_xm, s_ym, s_ys, WIDE: tl.constexpr, b_m: tl.constexpr,
             b_n: tl.constexpr, b_k: tl.constexpr):
    """``y[split] (M, N) = x (M, K) @ W.T`` over ``steps`` blocks of ``b_k`` columns from ``split * steps``.

    Weights are rounded to the dtype of x. WIDE: multiply in float32 (float32 x, and under the interpreter).
    """
    o_v = tl.program_id(0) * (b_n // 16) + tl.arange(0, b_n // 16)
    o_row = tl.minimum(o_v, N // 16 - 1).to(tl.int64)[:, None] * K
    p_token = tokens_of(p_x, M, s_xm, b_m)
    dtype = tl.float32 if WIDE else p_x.dtype.element_ty
    acc = tl.zeros((b_m, b_n), tl.float32)
    first = tl.program_id(2) * steps
    for i in range(first, first + steps):
        o_c = i * b_k + tl.arange(0, b_k)
        m_c = o_c < K
        o_column = o_row + o_c[None, :]
        x = tl.load(p_token[:, None] + o_c[None, :], mask=m_c[None, :], other=0).to(dtype)
        scale = tl.load(p_s + o_column, mask=m_c[None, :], other=0)
        w = _vectors(p_w, o_column, m_c) * scale[:, :, None]
        acc = tl.dot(x, tl.reshape(tl.permute(w, (1, 0, 2)), (b_k, b_n)).to(dtype), acc, input_precision="ieee")
    store_tile(p_y, acc, M, N, s_ym, s_ys, b_m, b_n)


# -- launching --------------------------------------------------------------------------------------------------


def gemv(x: Tensor, points: Tensor, scale: Tensor, split: int | None = None) -> Tensor:
    """``x (M, K) -> (M, N)`` for a few tokens."""
    columns, rows, tile = x.shape[1], points.shape[0] * HEIGHT, GEMV_TILE

    def launch(y: Tensor, blocks: tuple[int, int], split: int, steps: int) -> None:
        pvq_gemv[(blocks[1], blocks[0], split)](
            x, points, scale, y, rows, columns, steps, x.stride(0), y.stride(1), y.stride(0), b_n=tile.b_n,
            b_k=tile.b_k, num_warps=tile.warps * 32 // WARP, num_stages=tile.stages)

    return split_product(x, rows, tile, split, launch)


def gemm(x: Tensor, points: Tensor, scale: Tensor, split: int | None = None) -> Tensor:
    """``x (M, K) -> (M, N)`` for many tokens; ``split`` programs share a tile's columns (None: as many as help)."""
    (tokens, columns), rows = x.shape, points.shape[0] * HEIGHT
    tile = tile_for(tokens, GEMM_TILES)

    def launch(y: Tensor, blocks: tuple[int, int], split: int, steps: int) -> None:
        pvq_gemm[(*blocks, split)](
            x, points, scale, y, tokens, rows, columns, steps, x.stride(0), y.stride(1), y.stride(0),
            WIDE=INTERPRET or x.dtype == torch.float32, b_m=tile.b_m, b_n=tile.b_n, b_k=tile.b_k,
            num_warps=tile.warps * 32 // WARP, num_stages=tile.stages)

    return split_product(x, rows, tile, split, launch)

"""Triton kernels for vector codes (``quant/formats/rvq.py``, ``vq.py``): one for a few tokens, one for many.

Codes are ``(N / HEIGHT, STAGES, K)``: threads next to one another read codes of columns next to one another, and each
gathers the 16 bytes of an entry for 8 rows. Codebooks of 256 are 4 KB a stage, in float16, and stay in the first cache.
As in ``triton_int.py``, tiles were chosen from compiled code. Shapes: M tokens, N rows, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.triton_int import INTERPRET, WARP, Tile, split_product, store_tile, tile_for, tokens_of

GEMV_TILE = Tile(b_m=1, b_n=32, b_k=64, warps=4, stages=2)
GEMM_TILES = (
    (16, Tile(b_m=16, b_n=64, b_k=64, warps=4, stages=3)),
    (None, Tile(b_m=64, b_n=64, b_k=64, warps=4, stages=3)),
)
"""Largest M -> tile; the last takes the rest."""


@triton.jit
def _vectors(p_w, p_books, o_v, o_c, m_c, K, STAGES: tl.constexpr, HEIGHT: tl.constexpr,
             ENTRIES: tl.constexpr):
    """float32 ``(b_v, b_k, HEIGHT)``: the vectors ``o_v (b_v)`` of rows at columns ``o_c (b_k)``."""
    p_code = p_w + o_v.to(tl.int64)[:, None] * (STAGES * K) + o_c[None, :]
    o_i = tl.arange(0, HEIGHT)
    code = tl.load(p_code, mask=m_c[None, :], other=0).to(tl.int32)
    value = tl.load(p_books + code[:, :, None] * HEIGHT + o_i).to(tl.float32)
    for stage in tl.static_range(1, STAGES):
        code = tl.load(p_code + stage * K, mask=m_c[None, :], other=0).to(tl.int32)
        value += tl.load(p_books + (stage * ENTRIES + code)[:, :, None] * HEIGHT + o_i).to(tl.float32)
    return value


@triton.jit
def vector_gemv(p_x, p_w, p_books, p_y, N, K, steps, s_xm, s_ym, s_ys, STAGES: tl.constexpr, HEIGHT: tl.constexpr,
                ENTRIES: tl.constexpr, b_n: tl.constexpr, b_k: tl.constexpr):
    """``y[split] (M, N) = x (M, K) @ W.T`` for a token or two: ``b_n`` rows in a program, float32 throughout."""
    token = tl.program_id(0).to(tl.int64)
    o_v = tl.program_id(1) * (b_n // HEIGHT) + tl.arange(0, b_n // HEIGHT)
    acc = tl.zeros((b_n // HEIGHT, b_k, HEIGHT), tl.float32)
    first = tl.program_id(2) * steps
    for i in range(first, first + steps):
        o_c = i * b_k + tl.arange(0, b_k)
        m_c = o_c < K
        x = tl.load(p_x + token * s_xm + o_c, mask=m_c, other=0).to(tl.float32)
        value = _vectors(p_w, p_books, tl.minimum(o_v, N // HEIGHT - 1), o_c, m_c, K, STAGES, HEIGHT, ENTRIES)
        acc += value * x[None, :, None]
    o_n = o_v[:, None] * HEIGHT + tl.arange(0, HEIGHT)[None, :]
    p_out = p_y + tl.program_id(2).to(tl.int64) * s_ys + token * s_ym + o_n
    tl.store(p_out, tl.sum(acc, axis=1).to(p_y.dtype.element_ty), mask=o_n < N)


@triton.jit
def vector_gemm(p_x, p_w, p_books, p_y, M, N, K, steps, s_xm, s_ym, s_ys, STAGES: tl.constexpr, HEIGHT: tl.constexpr,
                ENTRIES: tl.constexpr, WIDE: tl.constexpr, b_m: tl.constexpr, b_n: tl.constexpr, b_k: tl.constexpr):
    """``y[split] (M, N) = x (M, K) @ W.T`` over ``steps`` blocks of ``b_k`` columns from ``split * steps``.

    Sums of entries are rounded to the dtype of x. WIDE: multiply in float32 (float32 x, and under the interpreter).
    """
    o_v = tl.program_id(0) * (b_n // HEIGHT) + tl.arange(0, b_n // HEIGHT)
    p_token = tokens_of(p_x, M, s_xm, b_m)
    dtype = tl.float32 if WIDE else p_x.dtype.element_ty
    acc = tl.zeros((b_m, b_n), tl.float32)
    first = tl.program_id(2) * steps
    for i in range(first, first + steps):
        o_c = i * b_k + tl.arange(0, b_k)
        m_c = o_c < K
        x = tl.load(p_token[:, None] + o_c[None, :], mask=m_c[None, :], other=0).to(dtype)
        w = _vectors(p_w, p_books, tl.minimum(o_v, N // HEIGHT - 1), o_c, m_c, K, STAGES, HEIGHT, ENTRIES)
        acc = tl.dot(x, tl.reshape(tl.permute(w, (1, 0, 2)), (b_k, b_n)).to(dtype), acc, input_precision="ieee")
    store_tile(p_y, acc, M, N, s_ym, s_ys, b_m, b_n)


# -- launching --------------------------------------------------------------------------------------------------


def gemv(x: Tensor, codes: Tensor, books: Tensor, split: int | None = None) -> Tensor:
    """``x (M, K) -> (M, N)`` for a few tokens, of ``codes (N / height, stages, K)`` and ``books (stages * entries,
    height)`` in float16, 2, 4 or 8 high."""
    (_, stages, columns), height, tile = codes.shape, books.shape[1], GEMV_TILE
    rows = len(codes) * height

    def launch(y: Tensor, blocks: tuple[int, int], split: int, steps: int) -> None:
        vector_gemv[(blocks[1], blocks[0], split)](
            x, codes, books, y, rows, columns, steps, x.stride(0), y.stride(1), y.stride(0), STAGES=stages,
            HEIGHT=height, ENTRIES=len(books) // stages, b_n=tile.b_n, b_k=tile.b_k,
            num_warps=tile.warps * 32 // WARP, num_stages=tile.stages)

    return split_product(x, rows, tile, split, launch)


def gemm(x: Tensor, codes: Tensor, books: Tensor, split: int | None = None) -> Tensor:
    """``x (M, K) -> (M, N)`` for many tokens; ``split`` programs share a tile's columns (None: as many as help)."""
    (tokens, columns), (vectors, stages, _), height = x.shape, codes.shape, books.shape[1]
    rows, tile = vectors * height, tile_for(tokens, GEMM_TILES)

    def launch(y: Tensor, blocks: tuple[int, int], split: int, steps: int) -> None:
        vector_gemm[(*blocks, split)](
            x, codes, books, y, tokens, rows, columns, steps, x.stride(0), y.stride(1), y.stride(0), STAGES=stages,
            HEIGHT=height, ENTRIES=len(books) // stages, WIDE=INTERPRET or x.dtype == torch.float32, b_m=tile.b_m,
            b_n=tile.b_n, b_k=tile.b_k, num_warps=tile.warps * 32 // WARP, num_stages=tile.stages)

    return split_product(x, rows, tile, split, launch)

"""Triton kernel for vectors of columns (``RowVectors`` of ``quant/formats/vq.py``), for a few tokens.

Every entry is multiplied by the inputs of its place first, in float32, by a product that torch has a kernel for. An
output is then a sum over that table, one look-up for all columns of a vector. As in ``triton_int.py``, tiles were
chosen from compiled code. Shapes: M tokens, N rows, G places of vectors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.triton_int import WARP, Tile

LOOKUPS = 512
"""Of a program in a step."""

PLACES = 32
"""Of a step at most: threads next to one another read codes next to one another."""


@triton.jit
def row_gemv(p_t, p_w, p_y, M, N, G, ENTRIES: tl.constexpr, b_n: tl.constexpr, b_g: tl.constexpr):
    """``y (M, N)``: sums over places of a table ``(G, M, ENTRIES)`` at codes ``(N, G)``; ``b_n`` rows a program."""
    token = tl.program_id(0)
    o_n = tl.program_id(1) * b_n + tl.arange(0, b_n)
    p_row = p_w + tl.minimum(o_n, N - 1).to(tl.int64) * G  # rows past the end repeat the last one and are not stored
    acc = tl.zeros((b_n, b_g), tl.float32)
    for start in range(0, G, b_g):
        o_g = start + tl.arange(0, b_g)
        m_g = (o_g < G)[None, :]
        code = tl.load(p_row[:, None] + o_g[None, :], mask=m_g, other=0).to(tl.int32)
        acc += tl.load(p_t + ((o_g * M + token) * ENTRIES)[None, :] + code, mask=m_g, other=0)
    tl.store(p_y + token.to(tl.int64) * N + o_n, tl.sum(acc, axis=1).to(p_y.dtype.element_ty), mask=o_n < N)


# -- launching --------------------------------------------------------------------------------------------------


def gemv_tile(places: int, length: int) -> Tile:
    b_g = min(PLACES, triton.next_power_of_2(places))
    return Tile(b_m=1, b_n=LOOKUPS // b_g, b_k=b_g * length, warps=4, stages=2)


def gemv(x: Tensor, codes: Tensor, books: Tensor) -> Tensor:
    """``x (M, K) -> (M, N)`` of ``codes (N, G)`` and ``books (G or 1, length, entries)`` in float32."""
    (rows, places), (own, length, entries) = codes.shape, books.shape
    tile = gemv_tile(places, length)
    inputs = x.float().view(-1, places, length).transpose(0, 1)  # (G, M, length)
    table = inputs @ (books if own > 1 else books[0])
    y = torch.empty(len(x), rows, dtype=x.dtype, device=x.device)
    row_gemv[(len(x), triton.cdiv(rows, tile.b_n))](
        table.contiguous(), codes, y, len(x), rows, places, ENTRIES=entries, b_n=tile.b_n, b_g=tile.b_k // length,
        num_warps=tile.warps * 32 // WARP, num_stages=tile.stages)
    return y

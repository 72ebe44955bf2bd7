"""Triton kernels for trellis codes (``quant/formats/trellis.py``): one for a few tokens, one for many.

The string of a tile has 32 k bits for each of its columns, and tiles that share rows follow one another, so column c of
a row of tiles is the k words from ``c * k`` on: a thread reads one column of 32 weights, and the word before it, which
has the older bits of its first states. States are cut out of 32-bit windows by joins that stay in the registers of the
thread. A hash of four bytes is added up by one ``dp4a``, whose third operand makes the sum a float's low bits.

Codes have no scale but ``step``, which is applied to sums. As in ``triton_int.py``, tiles were chosen from compiled
code. Shapes: M tokens, N rows, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.triton_int import INTERPRET, WARP, Tile, split_product, store_tile, tile_for, tokens_of
from fewbits.quant.formats.trellis import TrellisFormat

HEIGHT = TrellisFormat.height
GEMV_TILE = Tile(b_m=1, b_n=HEIGHT, b_k=128, warps=4, stages=2)
"""A column of 32 weights for every thread."""

GEMM_TILES = (
    (16, Tile(b_m=16, b_n=64, b_k=64, warps=4, stages=3)),
    (None, Tile(b_m=64, b_n=64, b_k=64, warps=4, stages=3)),
)
"""Largest M -> tile; the last takes the rest."""

DP4A = not INTERPRET and torch.version.hip is None
"""Whether the byte sum is one instruction of NVIDIA's."""


@triton.jit
def _load(p, m, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(p).to(tl.uint32, bitcast=True)
    else:
        return tl.load(p, mask=m, other=0).to(tl.uint32, bitcast=True)


@triton.jit
def _states(p_row, o_c, m_c, BITS: tl.constexpr, EVEN: tl.constexpr):
    """States of the 32 rows of columns ``o_c`` of rows of tiles ``p_row``: the low 16 bits of uint32.

    Of the shape of ``p_row + o_c``, with as many axes of 2 after it as make 32: reshape it.
    """
    p_word = p_row + o_c * BITS
    # the string is circular within a tile of 8 columns
    older = _load(p_row + tl.where(o_c % 8 == 0, o_c + 8, o_c) * BITS - 1, m_c, EVEN)
    w0 = _load(p_word, m_c, EVEN)
    if BITS == 1:
        raw = tl.join((older << 16) | (w0 >> 16), w0)
    elif BITS == 2:
        w1 = _load(p_word + 1, m_c, EVEN)
        raw = tl.join(tl.join((older << 16) | (w0 >> 16), (w0 << 16) | (w1 >> 16)), tl.join(w0, w1))
    elif BITS == 3:  # 8 windows that end every 12 bits: 4 states each
        w1 = _load(p_word + 1, m_c, EVEN)
        w2 = _load(p_word + 2, m_c, EVEN)
        a = tl.join(tl.join((older << 12) | (w0 >> 20), (w0 << 28) | (w1 >> 4)),
                    tl.join((w0 << 4) | (w1 >> 28), (w1 << 20) | (w2 >> 12)))
        b = tl.join(tl.join((older << 24) | (w0 >> 8), (w1 << 8) | (w2 >> 24)),
                    tl.join((w0 << 16) | (w1 >> 16), w2))
        raw = tl.join(a, b)
        raw = tl.join(raw >> 6, raw)
        raw = tl.join(raw >> 3, raw)
    else:
        w1 = _load(p_word + 1, m_c, EVEN)
        w2 = _load(p_word + 2, m_c, EVEN)
        w3 = _load(p_word + 3, m_c, EVEN)
        a = tl.join(tl.join((older << 16) | (w0 >> 16), (w1 << 16) | (w2 >> 16)),
                    tl.join((w0 << 16) | (w1 >> 16), (w2 << 16) | (w3 >> 16)))
        b = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        raw = tl.join(a, b)
    if BITS != 3:  # windows that end every 16 bits
        raw = tl.join(raw >> 8, raw)
        raw = tl.join(raw >> 4, raw)
        if BITS <= 2:
            raw = tl.join(raw >> 2, raw)
        if BITS == 1:
            raw = tl.join(raw >> 1, raw)
    return raw


@triton.jit
def _values(states, STATES: tl.constexpr, DP4A: tl.constexpr):
    """float32 codebook entries in units of the step: the bytes of a hash added up, less 510."""
    hashes = (states & ((1 << STATES) - 1)) * 0x83DCD12D
    if DP4A:
        total = tl.inline_asm_elementwise("dp4a.u32.u32 $0, $1, 0x01010101, 0x4B000000;", "=r,r", [hashes],
                                          dtype=tl.uint32, is_pure=True, pack=1)
    else:
        pairs = (hashes & 0x00FF00FF) + ((hashes >> 8) & 0x00FF00FF)
        total = ((pairs + (pairs >> 16)) & 0x7FF) | 0x4B000000
    return total.to(tl.float32, bitcast=True) - (8388608.0 + 510.0)


@triton.jit
def trellis_gemv(p_x, p_w, p_y, N, K, steps, step, s_xm, s_ym, s_ys, BITS: tl.constexpr, STATES: tl.constexpr,
                 EVEN: tl.constexpr, DP4A: tl.constexpr, b_k: tl.constexpr):
    """``y[split] (M, N) = x (M, K) @ W.T`` for a token or two: a row of tiles in a program, float32 throughout."""
    token = tl.program_id(0).to(tl.int64)
    p_row = p_w + tl.program_id(1).to(tl.int64) * K * BITS
    acc = tl.zeros((b_k, 32), tl.float32)
    first = tl.program_id(2) * steps
    for i in range(first, first + steps):
        o_c = i * b_k + tl.arange(0, b_k)
        m_c = o_c < K
        x = tl.load(p_x + token * s_xm + o_c, mask=m_c, other=0).to(tl.float32)
        states = tl.reshape(_states(p_row, o_c, m_c, BITS, EVEN), (b_k, 32))
        acc += _values(states, STATES, DP4A) * x[:, None]
    p_out = p_y + tl.program_id(2).to(tl.int64) * s_ys + token * s_ym + tl.program_id(1) * 32 + tl.arange(0, 32)
    tl.store(p_out, (tl.sum(acc, axis=0) * step).to(p_y.dtype.element_ty))


@triton.jit
def trellis_gemm(p_x, p_w, p_y, M, N, K, steps, step, s_xm, s_ym, s_ys, BITS: tl.constexpr, STATES: tl.constexpr,
                 EVEN: tl.constexpr, DP4A: tl.constexpr, WIDE: tl.constexpr, b_m: tl.constexpr, b_n: tl.constexpr,
                 b_k: tl.constexpr):
    """``y[split] (M, N) = x (M, K) @ W.T`` over ``steps`` blocks of ``b_k`` columns from ``split * steps``.

    The dot takes codebook entries as integers, exact in float16 and rounded to 8 bits in bfloat16; ``step`` is applied
    to the sums. WIDE: multiply in float32 (float32 x, and always under the interpreter, whose bfloat16 is wrong).
    """
    o_tile = tl.program_id(0) * (b_n // 32) + tl.arange(0, b_n // 32)
    p_row = p_w + tl.minimum(o_tile, N // 32 - 1).to(tl.int64)[:, None] * K * BITS
    p_token = tokens_of(p_x, M, s_xm, b_m)
    dtype = tl.float32 if WIDE else p_x.dtype.element_ty
    acc = tl.zeros((b_m, b_n), tl.float32)
    first = tl.program_id(2) * steps
    for i in range(first, first + steps):
        o_c = i * b_k + tl.arange(0, b_k)
        m_c = o_c < K
        x = tl.load(p_token[:, None] + o_c[None, :], mask=m_c[None, :], other=0).to(dtype)
        columns = tl.zeros((b_n // 32, 1), tl.int32) + o_c[None, :]
        states = tl.reshape(_states(p_row, columns, columns < K, BITS, EVEN), (b_n // 32, b_k, 32))
        w = tl.reshape(tl.permute(_values(states, STATES, DP4A), (1, 0, 2)), (b_k, b_n)).to(dtype)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    store_tile(p_y, acc * step, M, N, s_ym, s_ys, b_m, b_n)


# -- launching --------------------------------------------------------------------------------------------------


def gemv(x: Tensor, packed: Tensor, fmt: TrellisFormat, split: int | None = None) -> Tensor:
    """``x (M, K) -> (M, N)`` for a few tokens."""
    columns, rows, tile = x.shape[1], packed.shape[0] * HEIGHT, GEMV_TILE

    def launch(y: Tensor, blocks: tuple[int, int], split: int, steps: int) -> None:
        trellis_gemv[(blocks[1], blocks[0], split)](
            x, packed, y, rows, columns, steps, fmt.step, x.stride(0), y.stride(1), y.stride(0), BITS=fmt.code_bits,
            STATES=fmt.state_bits, EVEN=columns % (tile.b_k * split) == 0, DP4A=DP4A, b_k=tile.b_k,
            num_warps=tile.warps * 32 // WARP, num_stages=tile.stages)

    return split_product(x, rows, tile, split, launch)


def gemm(x: Tensor, packed: Tensor, fmt: TrellisFormat, split: int | None = None) -> Tensor:
    """``x (M, K) -> (M, N)`` for many tokens; ``split`` programs share a tile's columns (None: as many as help)."""
    (tokens, columns), rows = x.shape, packed.shape[0] * HEIGHT
    tile = tile_for(tokens, GEMM_TILES)

    def launch(y: Tensor, blocks: tuple[int, int], split: int, steps: int) -> None:
        trellis_gemm[(*blocks, split)](
            x, packed, y, tokens, rows, columns, steps, fmt.step, x.stride(0), y.stride(1), y.stride(0),
            BITS=fmt.code_bits, STATES=fmt.state_bits, EVEN=columns % (tile.b_k * split) == 0, DP4A=DP4A,
            WIDE=INTERPRET or x.dtype == torch.float32, b_m=tile.b_m, b_n=tile.b_n, b_k=tile.b_k,
            num_warps=tile.warps * 32 // WARP, num_stages=tile.stages)

    return split_product(x, rows, tile, split, launch)

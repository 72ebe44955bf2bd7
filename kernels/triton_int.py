"""Triton kernels for packed integer codes of 1, 2, 3, 4 and 8 bits: one for a few tokens, one for many.

Both read the disk layout. A *run* is what one load brings in: the codes of one word, or for 3 bits, whose codes
straddle words, 32 codes in 3 words that stay in the registers of one thread, so the funnel shift costs no exchange.
Codes become floats without a conversion instruction, which has a quarter of the rate of an addition: code | 2^23 as
float bits, minus 2^23, is exactly the code; and for a few tokens without a shift, wherever in the low bits it lies.

Operands as in ``reference.py``; ``dispatch.prepare`` makes ``scale`` and ``zero`` column-major for the gemm.
Nothing is tuned at start-up: tiles come from the small tables below. They were chosen from compiled code (registers,
spills, width of loads, see ``aot.py``), not from timings on a GPU.

Prefixes: p_ pointer, s_ stride, b_ block, o_ offset, m_ mask. Shapes: M tokens, N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

INTERPRET = triton.knobs.runtime.interpret
RUNS = {1: 32, 2: 16, 3: 32, 4: 8, 8: 4}
"""Bits -> columns of a run."""


@triton.jit
def load(p, m, EVEN: tl.constexpr):
    """EVEN: nothing lies beyond an end, so that no mask is needed."""
    if EVEN:
        return tl.load(p)
    else:
        return tl.load(p, mask=m, other=0)


@triton.jit
def run_words(p_row, o_run, words, BITS: tl.constexpr, EVEN: tl.constexpr):
    """Runs ``o_run (b_r)`` of rows ``p_row (b_n)`` as uint32 that hold whole codes from their lowest bit on.

    ``(b_n, b_r)``; of 3 bits ``(b_n, b_r, 2, 2)``: 32 codes in 3 words are 4 pieces of 8 codes in 24 bits, and what is
    above these is no part of a piece.
    """
    if BITS == 3:
        o_word = (o_run * 3)[None, :]
        p_word = p_row[:, None] + o_word
        w0 = load(p_word, o_word < words, EVEN).to(tl.uint32, bitcast=True)
        w1 = load(p_word + 1, o_word + 1 < words, EVEN).to(tl.uint32, bitcast=True)
        w2 = load(p_word + 2, o_word + 2 < words, EVEN).to(tl.uint32, bitcast=True)
        even = tl.join(w0, (w1 >> 16) | (w2 << 16))
        return tl.join(even, tl.join((w0 >> 24) | (w1 << 8), w2 >> 8))
    else:
        word = load(p_row[:, None] + o_run[None, :], (o_run < words)[None, :], EVEN)
        return word.to(tl.uint32, bitcast=True)


@triton.jit
def run_bits(p_row, o_run, words, BITS: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr):
    """Runs ``o_run (b_r)`` of rows ``p_row (b_n)``: uint32 ``(b_n, b_r, RUN)`` with each code in the lowest bits.

    Halves are joined until a code is left. A join keeps both halves in the registers of the thread that loaded the
    word; a broadcast against an arange of shifts let the compiler spread a word over 8 threads, which cost 3 times
    the instructions.
    """
    raw = run_words(p_row, o_run, words, BITS, EVEN)
    if BITS == 3:
        raw = tl.join(raw, raw >> 12)
        raw = tl.join(raw, raw >> 6)
        raw = tl.join(raw, raw >> 3)
    else:
        raw = tl.join(raw, raw >> 16)
        raw = tl.join(raw, raw >> 8)
        if BITS <= 4:
            raw = tl.join(raw, raw >> 4)
        if BITS <= 2:
            raw = tl.join(raw, raw >> 2)
        if BITS == 1:
            raw = tl.join(raw, raw >> 1)
    return tl.reshape(raw, (p_row.shape[0], o_run.shape[0], RUN))


@triton.jit
def _code(a, i: tl.constexpr, BITS: tl.constexpr):
    """Code ``i`` of a word whose exponent bits are those of 2^23 already: all other bits go."""
    return a & (0x4B000000 | (((1 << BITS) - 1) << (i * BITS)))


@triton.jit
def _four_codes(a, i: tl.constexpr, step: tl.constexpr, BITS: tl.constexpr):
    """Codes ``i, i + step, i + 2 step, i + 3 step``, in this order along two new axes."""
    return tl.join(tl.join(_code(a, i, BITS), _code(a, i + 2 * step, BITS)),
                   tl.join(_code(a, i + step, BITS), _code(a, i + 3 * step, BITS)))


@triton.jit
def run_codes(p_row, o_run, words, BITS: tl.constexpr, RUN: tl.constexpr, EVEN: tl.constexpr):
    """Runs as in :func:`run_bits`: float32 ``(b_n, b_r, RUN)``, exactly each code over its :func:`run_units`.

    A code becomes a float where it lies in its word, in the low bits of 2^23, so that it takes one instruction and no
    shift. The powers of two that stand before them are taken from x, where many rows share the work.
    """
    whole = run_words(p_row, o_run, words, BITS, EVEN)
    a = tl.join(whole, whole >> (12 if BITS == 3 else 16)) | 0x4B000000
    if BITS == 8:
        raw = tl.join(_code(a, 0, BITS), _code(a, 1, BITS))
    elif BITS >= 3:
        raw = _four_codes(a, 0, 1, BITS)
    elif BITS == 2:
        raw = tl.join(_four_codes(a, 0, 2, BITS), _four_codes(a, 1, 2, BITS))
    else:
        raw = tl.join(tl.join(_four_codes(a, 0, 4, BITS), _four_codes(a, 2, 4, BITS)),
                      tl.join(_four_codes(a, 1, 4, BITS), _four_codes(a, 3, 4, BITS)))
    raw = tl.reshape(raw, (p_row.shape[0], o_run.shape[0], RUN))
    return raw.to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def run_units(BITS: tl.constexpr, RUN: tl.constexpr):
    """float32 ``(RUN,)``: the powers of two by which codes are more in :func:`run_codes`, inverted."""
    PER: tl.constexpr = 4 if BITS == 3 else 16 // BITS
    exponent = 127 - BITS * (tl.arange(0, RUN) % PER)
    return (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def _minus_zero(raw, zero, BITS: tl.constexpr):
    """float32 ``code - zero``, exactly, of the codes in the lowest bits of ``raw``."""
    magic = (raw & ((1 << BITS) - 1)) | 0x4B000000
    return magic.to(tl.float32, bitcast=True) - (8388608.0 + zero)


@triton.jit
def _params(p_s, p_z, m, BITS: tl.constexpr, SYM: tl.constexpr, EVEN: tl.constexpr):
    """float32 scales and zeros at pointers of any shape."""
    scale = load(p_s, m, EVEN).to(tl.float32)
    if SYM:
        return scale, tl.full(scale.shape, 1 << (BITS - 1), tl.float32)
    else:
        return scale, load(p_z, m, EVEN).to(tl.float32)


@triton.jit
def int_gemv(p_x, p_w, p_s, p_z, p_y, N, K, words, s_xm, s_ym, s_sn, s_sg, BITS: tl.constexpr, RUN: tl.constexpr,
             GROUP: tl.constexpr, SYM: tl.constexpr, EVEN: tl.constexpr, b_n: tl.constexpr, b_r: tl.constexpr):
    """``y (M, N) = x (M, K) @ W.T`` for a token or two: all of a row in one program, float32 throughout.

    A program makes ``b_n`` rows of one token and steps over ``b_r`` runs of each; every thread keeps its own partial
    sums and they meet once, at the end. No dot: tensor cores would wait for the exchange through shared memory.
    GROUP is the group size, 0 for one group per row. EVEN: K is a multiple of a step, so that nothing is masked.
    """
    o_n = tl.program_id(1) * b_n + tl.arange(0, b_n)
    token = tl.program_id(0).to(tl.int64)  # the faster axis: programs that read the same rows run at the same time
    row = tl.minimum(o_n, N - 1).to(tl.int64)  # rows past the end repeat the last one and are not stored
    o_r, o_j = tl.arange(0, b_r), tl.arange(0, RUN)
    p_row = p_w + row * words
    unit = run_units(BITS, RUN)
    acc = tl.zeros((b_n, b_r), tl.float32)
    for start in range(0, tl.cdiv(K, RUN), b_r):
        o_run = start + o_r
        o_k = o_run[:, None] * RUN + o_j[None, :]
        x = load(p_x + token * s_xm + o_k, o_k < K, EVEN).to(tl.float32)
        codes = run_codes(p_row, o_run, words, BITS, RUN, EVEN)
        if GROUP % RUN == 0:  # a run lies in one group (also for GROUP == 0), and its zero point is taken off its sum
            o_g = (o_run * RUN) // GROUP if GROUP else o_run * 0
            o_param = row[:, None] * s_sn + o_g[None, :] * s_sg
            scale, zero = _params(p_s + o_param, p_z + o_param, (o_run * RUN < K)[None, :], BITS, SYM, EVEN)
            part = tl.sum((x * unit[None, :])[None, :, :] * codes, axis=2)
            acc += (part - tl.sum(x, axis=1)[None, :] * zero) * scale
        else:
            o_param = row[:, None, None] * s_sn + (o_k // GROUP)[None, :, :] * s_sg
            scale, zero = _params(p_s + o_param, p_z + o_param, (o_k < K)[None, :, :], BITS, SYM, EVEN)
            acc += tl.sum(x[None, :, :] * ((codes * unit[None, None, :] - zero) * scale), axis=2)
    y = tl.sum(acc, axis=1)
    tl.store(p_y + token * s_ym + o_n, y.to(p_y.dtype.element_ty), mask=o_n < N)


@triton.jit
def int_gemm(p_x, p_w, p_s, p_z, p_y, M, N, K, words, steps, s_xm, s_ym, s_ys, s_sn, s_sg, BITS: tl.constexpr,
             RUN: tl.constexpr, GROUP: tl.constexpr, SYM: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
             b_m: tl.constexpr, b_n: tl.constexpr, b_k: tl.constexpr):
    """``y[split] (M, N) = x (M, K) @ W.T`` over ``steps`` blocks of ``b_k`` columns from ``split * steps``.

    Where a block lies in one group (GROUP a multiple of b_k, or 0: one group per row) the dot takes codes minus
    2^(b-1), which are exact in every dtype; scale and zero point are applied to the product in float32, so they cost
    per output and not per weight. Otherwise weights are rounded to the dtype of x first. Partial products of splits
    are summed by the caller, in a fixed order. WIDE: multiply in float32 (float32 x, and always under the interpreter,
    whose bfloat16 arithmetic is wrong).
    """
    o_n = tl.program_id(0) * b_n + tl.arange(0, b_n)
    row = tl.minimum(o_n, N - 1).to(tl.int64)
    p_row = p_w + row * words
    p_token = tokens_of(p_x, M, s_xm, b_m)
    o_k, o_r, o_j = tl.arange(0, b_k), tl.arange(0, b_k // RUN), tl.arange(0, RUN)
    dtype = tl.float32 if WIDE else p_x.dtype.element_ty
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    acc = tl.zeros((b_m, b_n), tl.float32)
    first = tl.program_id(2) * steps
    for step in range(first, first + steps):
        k = step * b_k
        x = load(p_token[:, None] + (k + o_k)[None, :], (k + o_k < K)[None, :], EVEN).to(dtype)
        raw = run_bits(p_row, k // RUN + o_r, words, BITS, RUN, EVEN)
        if GROUP % b_k == 0:
            o_param = row * s_sn + (k // GROUP if GROUP else 0) * s_sg
            scale, zero = _params(p_s + o_param, p_z + o_param, (o_n * 0 + k) < K, BITS, SYM, EVEN)
            w = tl.reshape(_minus_zero(raw, MIDDLE, BITS).to(dtype), (b_n, b_k))
            part = tl.dot(x, tl.trans(w), input_precision="ieee")
            if not SYM:
                part -= tl.sum(x.to(tl.float32), axis=1)[:, None] * (zero - MIDDLE)[None, :]
            acc += part * scale[None, :]
        else:
            o_column = k + o_r[:, None] * RUN + o_j[None, :]
            o_param = row[:, None, None] * s_sn + (o_column // GROUP)[None, :, :] * s_sg
            scale, zero = _params(p_s + o_param, p_z + o_param, (o_column < K)[None, :, :], BITS, SYM, EVEN)
            w = tl.reshape((_minus_zero(raw, zero, BITS) * scale).to(dtype), (b_n, b_k))
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    store_tile(p_y, acc, M, N, s_ym, s_ys, b_m, b_n)


@triton.jit
def tokens_of(p_x, M, s_xm, b_m: tl.constexpr):
    """``(b_m,)``: where the tokens of this program begin; tokens past the end repeat the last one."""
    o_m = tl.program_id(1) * b_m + tl.arange(0, b_m)
    return p_x + tl.minimum(o_m, M - 1).to(tl.int64) * s_xm


@triton.jit
def store_tile(p_y, acc, M, N, s_ym, s_ys, b_m: tl.constexpr, b_n: tl.constexpr):
    """``acc (b_m, b_n)`` to where this program's rows, tokens and share of the columns belong."""
    o_n = tl.program_id(0) * b_n + tl.arange(0, b_n)
    o_m = tl.program_id(1) * b_m + tl.arange(0, b_m)
    p_out = p_y + tl.program_id(2).to(tl.int64) * s_ys + o_m.to(tl.int64)[:, None] * s_ym + o_n[None, :]
    tl.store(p_out, acc.to(p_y.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


# -- launching --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """Block sizes of a launch: ``b_m`` tokens, ``b_n`` rows, ``b_k`` columns a step; ``warps`` of 32 threads."""

    b_m: int
    b_n: int
    b_k: int
    warps: int
    stages: int


GEMV_TILES = (
    (16384, Tile(b_m=1, b_n=8, b_k=512, warps=4, stages=2)),
    (None, Tile(b_m=1, b_n=16, b_k=512, warps=2, stages=2)),
)
"""Largest N -> tile. A thread has 32 weights of a row in a step (a run of 3-bit codes must not be shared by two); or
128 of several rows, which share what it takes to bring x in, but that leaves fewer threads: only where rows abound."""

WARP = 64 if torch.version.hip else 32
"""Threads of a warp of the GPU that torch was built for."""

GEMM_TILES = (
    (16, Tile(b_m=16, b_n=32, b_k=128, warps=4, stages=4)),
    (64, Tile(b_m=64, b_n=64, b_k=64, warps=4, stages=3)),
    (None, Tile(b_m=64, b_n=128, b_k=64, warps=8, stages=3)),
)
"""Largest M -> tile; the last takes the rest."""

MAX_SPLIT = 8


def tile_for(size: int, tiles: Iterable[tuple[int | None, Tile]]) -> Tile:
    """The first tile whose largest size is not exceeded."""
    return next(t for limit, t in tiles if limit is None or size <= limit)


def gemm_tile(tokens: int, bits: int, group: int) -> Tile:
    """The tile for M = ``tokens``, with ``b_k`` cut to a power of two that divides ``group`` where that is possible."""
    tile = tile_for(tokens, GEMM_TILES)
    b_k = tile.b_k
    while group % b_k and b_k > max(16, RUNS[bits]):
        b_k //= 2
    return Tile(tile.b_m, tile.b_n, tile.b_k if group % b_k else b_k, tile.warps, tile.stages)


def gemv(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``x (M, K) -> (M, N)`` for a few tokens."""
    tokens, columns = x.shape
    rows, words = packed.shape
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    group = 0 if scale.shape[1] == 1 else columns // scale.shape[1]
    tile = tile_for(rows, GEMV_TILES)
    int_gemv[(tokens, triton.cdiv(rows, tile.b_n))](
        x, packed, scale, packed if zero is None else zero, y, rows, columns, words, x.stride(0), y.stride(0),
        scale.stride(0), scale.stride(1), BITS=bits, RUN=RUNS[bits], GROUP=group, SYM=zero is None,
        EVEN=columns % tile.b_k == 0, b_n=tile.b_n, b_r=tile.b_k // RUNS[bits],
        num_warps=tile.warps * 32 // WARP, num_stages=tile.stages)
    return y


def gemm(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, split: int | None = None) -> Tensor:
    """``x (M, K) -> (M, N)`` for many tokens; ``split`` programs share a tile's columns (None: as many as help)."""
    tokens, columns = x.shape
    rows, words = packed.shape
    group = 0 if scale.shape[1] == 1 else columns // scale.shape[1]
    tile = gemm_tile(tokens, bits, group)

    def launch(y: Tensor, blocks: tuple[int, int], split: int, steps: int) -> None:
        int_gemm[(*blocks, split)](
            x, packed, scale, packed if zero is None else zero, y, tokens, rows, columns, words, steps, x.stride(0),
            y.stride(1), y.stride(0), scale.stride(0), scale.stride(1), BITS=bits, RUN=RUNS[bits], GROUP=group,
            SYM=zero is None, EVEN=columns % (tile.b_k * split) == 0, WIDE=INTERPRET or x.dtype == torch.float32,
            b_m=tile.b_m, b_n=tile.b_n, b_k=tile.b_k, num_warps=tile.warps * 32 // WARP, num_stages=tile.stages)

    return split_product(x, rows, tile, split, launch)


Launch = Callable[[Tensor, tuple[int, int], int, int], None]
"""``launch(y (split, M, N), (blocks of rows, blocks of tokens), split, steps of columns for each)``."""


def split_product(x: Tensor, rows: int, tile: Tile, split: int | None, launch: Launch) -> Tensor:
    """``(M, N)`` in the dtype of x: partial products of ``split`` shares of the columns, added in a fixed order.

    Args:
        split: None for as many as help.
    """
    tokens, columns = x.shape
    blocks = triton.cdiv(rows, tile.b_n), triton.cdiv(tokens, tile.b_m)
    steps = triton.cdiv(columns, tile.b_k)
    if split is None:
        split = choose_split(blocks[0] * blocks[1], steps, processors(x.device))
    y = torch.empty(split, tokens, rows, dtype=torch.float32 if split > 1 else x.dtype, device=x.device)
    launch(y, blocks, split, triton.cdiv(steps, split))
    return y.sum(0).to(x.dtype) if split > 1 else y[0]


def choose_split(blocks: int, steps: int, units: int) -> int:
    """Programs that share a tile's columns: doubled while the GPU is less than twice full and each has 4 steps left."""
    split = 1
    while split < MAX_SPLIT and blocks * split < 2 * units and steps // (2 * split) >= 4:
        split *= 2
    return split


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 elsewhere (the interpreter)."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1

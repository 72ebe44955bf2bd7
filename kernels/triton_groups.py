"""Triton kernels for groups of few levels and of tables (``groups.py``): one for a few tokens, one for many.

Both read runs of packed codes as ``triton_int.py`` does. A level with one scale is an integer times it; one with
several is a sum over the bits of its code, each of which chooses between two numbers: a test, a choice and an addition.
Entries of tables are gathered from the book in shared memory, where 16 entries are in as many banks. Loads through
pointers, which the compiler moves to other threads and back, took twice the instructions. As in ``triton_int.py``,
tiles were chosen from compiled code.

Prefixes: p_ pointer, s_ stride, b_ block, o_ offset, m_ mask. Shapes: M tokens, N rows, K columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fewbits.kernels.triton_int import (
    GEMM_TILES,
    GEMV_TILES,
    INTERPRET,
    RUNS,
    WARP,
    Tile,
    load,
    run_bits,
    run_codes,
    run_units,
    split_product,
    store_tile,
    tile_for,
    tokens_of,
)
from fewbits.quant.formats.grid import GridFormat
from fewbits.quant.formats.levels import LevelsFormat


@triton.jit
def _numbers(p, row, k, K, s_n, s_g, RUN: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr, b_r: tl.constexpr):
    """Numbers of the groups of ``b_r`` runs of columns from ``k`` on, to broadcast against ``(b_n, b_r, RUN)``.

    They are read once for the block, for a run or for a weight, whatever is sure to lie in one group; and without axes
    of 1, for which the compiler would move the codes to other threads.
    """
    if GROUP % (b_r * RUN) == 0:
        o_g = k // GROUP if GROUP else 0
        return load(p + row * s_n + o_g * s_g, row * 0 + k < K, EVEN)[:, None, None]
    elif GROUP % RUN == 0:
        o_k = k + tl.arange(0, b_r) * RUN
        return load(p + row[:, None] * s_n + (o_k // GROUP)[None, :] * s_g, (o_k < K)[None, :], EVEN)[:, :, None]
    else:
        o_k = k + (tl.arange(0, b_r) * RUN)[:, None] + tl.arange(0, RUN)[None, :]
        return load(p + row[:, None, None] * s_n + (o_k // GROUP)[None, :, :] * s_g, (o_k < K)[None, :, :], EVEN)


@triton.jit
def _levels(raw, p_c, row, k, K, s_cn, s_cp, s_cg, BITS: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr,
            SCALES: tl.constexpr, START: tl.constexpr, STEP: tl.constexpr, MEAN: tl.constexpr, EVEN: tl.constexpr,
            b_r: tl.constexpr):
    """float32 of the shape of ``raw``: ``mean + sum_p scale_p (START + STEP bit_p)``, or with one scale and several
    bits ``mean + scale (START + STEP code)``."""
    scale = _numbers(p_c, row, k, K, s_cn, s_cg, RUN, GROUP, EVEN, b_r).to(tl.float32)
    if SCALES == 1 and BITS > 1:
        magic = (raw & ((1 << BITS) - 1)) | 0x4B000000
        value = (magic.to(tl.float32, bitcast=True) - 8388608.0) * (scale * STEP) + scale * START
    else:
        value = tl.where((raw & 1) != 0, scale * (START + STEP), scale * START)
        for i in tl.static_range(1, BITS):
            scale = _numbers(p_c + i * s_cp, row, k, K, s_cn, s_cg, RUN, GROUP, EVEN, b_r).to(tl.float32)
            value += tl.where((raw & (1 << i)) != 0, scale * (START + STEP), scale * START)
    if MEAN:
        value += _numbers(p_c + SCALES * s_cp, row, k, K, s_cn, s_cg, RUN, GROUP, EVEN, b_r).to(tl.float32)
    return value


@triton.jit
def _entries(raw, p_c, p_t, p_book, row, k, K, s_cn, s_cg, BITS: tl.constexpr, RUN: tl.constexpr,
             GROUP: tl.constexpr, TYPES: tl.constexpr, EVEN: tl.constexpr, b_r: tl.constexpr):
    """float32 of the shape of ``raw``: entries of the tables of each group, times its scale."""
    index = (raw & ((1 << BITS) - 1)).to(tl.int32)
    if TYPES > 1:
        index += _numbers(p_t, row, k, K, s_cn, s_cg, RUN, GROUP, EVEN, b_r).to(tl.int32) << BITS
    book = tl.load(p_book + tl.arange(0, TYPES << BITS))
    entry = tl.reshape(tl.gather(book, tl.reshape(index, (row.shape[0] * b_r * RUN,)), 0), index.shape)
    return entry * _numbers(p_c, row, k, K, s_cn, s_cg, RUN, GROUP, EVEN, b_r).to(tl.float32)


@triton.jit
def _weights(raw, row, k, p_c, p_t, p_book, K, s_cn, s_cp, s_cg, BITS: tl.constexpr, RUN: tl.constexpr,
             GROUP: tl.constexpr, SCALES: tl.constexpr, START: tl.constexpr, STEP: tl.constexpr, MEAN: tl.constexpr,
             TYPES: tl.constexpr, EVEN: tl.constexpr, b_r: tl.constexpr):
    """float32 ``(b_n, b_r, RUN)``: what codes ``raw`` of columns from ``k`` on mean."""
    if SCALES:
        return _levels(raw, p_c, row, k, K, s_cn, s_cp, s_cg, BITS, RUN, GROUP, SCALES, START, STEP, MEAN, EVEN, b_r)
    else:
        return _entries(raw, p_c, p_t, p_book, row, k, K, s_cn, s_cg, BITS, RUN, GROUP, TYPES, EVEN, b_r)


@triton.jit
def group_gemv(p_x, p_w, p_c, p_t, p_book, p_whole, p_y, N, K, words, s_xm, s_ym, s_cn, s_cp, s_cg,
               BITS: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, START: tl.constexpr,
               STEP: tl.constexpr, MEAN: tl.constexpr, TYPES: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
               b_n: tl.constexpr, b_r: tl.constexpr):
    """``y (M, N) = x (M, K) @ W.T`` for a token or two: all of a row in one program, float32 throughout.

    GROUP is the group size, 0 for one group per row. SCALES: of levels, 0 for tables, of which a group chooses one
    of TYPES. WHOLE: outputs are divided by one number. EVEN: K is a multiple of a step.
    """
    o_n = tl.program_id(1) * b_n + tl.arange(0, b_n)
    token = tl.program_id(0).to(tl.int64)  # the faster axis: programs that read the same rows run at the same time
    row = tl.minimum(o_n, N - 1).to(tl.int64)  # rows past the end repeat the last one and are not stored
    p_row = p_w + row * words
    unit = run_units(BITS, RUN)
    acc = tl.zeros((b_n, b_r), tl.float32)
    for start in range(0, tl.cdiv(K, RUN), b_r):
        o_run = start + tl.arange(0, b_r)
        o_k = o_run[:, None] * RUN + tl.arange(0, RUN)[None, :]
        x = load(p_x + token * s_xm + o_k, o_k < K, EVEN).to(tl.float32)
        if SCALES == 1 and GROUP % RUN == 0:  # levels are even: a run's scale and its start are applied to its sums
            o_param = row[:, None] * s_cn + ((o_run * RUN) // GROUP if GROUP else o_run * 0)[None, :] * s_cg
            m = (o_run * RUN < K)[None, :]
            part = tl.sum((x * unit[None, :])[None, :, :] * run_codes(p_row, o_run, words, BITS, RUN, EVEN), axis=2)
            total = tl.sum(x, axis=1)[None, :]
            acc += (part * STEP + total * START) * load(p_c + o_param, m, EVEN).to(tl.float32)
            if MEAN:
                acc += total * load(p_c + s_cp + o_param, m, EVEN).to(tl.float32)
        else:
            raw = run_bits(p_row, o_run, words, BITS, RUN, EVEN)
            w = _weights(raw, row, start * RUN, p_c, p_t, p_book, K, s_cn, s_cp, s_cg, BITS, RUN, GROUP, SCALES, START,
                         STEP, MEAN, TYPES, EVEN, b_r)
            acc += tl.sum(x[None, :, :] * w, axis=2)
    y = tl.sum(acc, axis=1)
    if WHOLE:
        y /= tl.load(p_whole)
    tl.store(p_y + token * s_ym + o_n, y.to(p_y.dtype.element_ty), mask=o_n < N)


@triton.jit
def group_gemm(p_x, p_w, p_c, p_t, p_book, p_whole, p_y, M, N, K, words, steps, s_xm, s_ym, s_ys, s_cn, s_cp, s_cg,
               BITS: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr, START: tl.constexpr,
               STEP: tl.constexpr, MEAN: tl.constexpr, TYPES: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
               WIDE: tl.constexpr, b_m: tl.constexpr, b_n: tl.constexpr, b_k: tl.constexpr):
    """``y[split] (M, N) = x (M, K) @ W.T`` over ``steps`` blocks of ``b_k`` columns from ``split * steps``.

    Weights are rounded to the dtype of x. WIDE: multiply in float32 (float32 x, and under the interpreter).
    """
    o_n = tl.program_id(0) * b_n + tl.arange(0, b_n)
    row = tl.minimum(o_n, N - 1).to(tl.int64)
    p_row = p_w + row * words
    p_token = tokens_of(p_x, M, s_xm, b_m)
    o_k = tl.arange(0, b_k)
    dtype = tl.float32 if WIDE else p_x.dtype.element_ty
    acc = tl.zeros((b_m, b_n), tl.float32)
    first = tl.program_id(2) * steps
    for step in range(first, first + steps):
        k = step * b_k
        x = load(p_token[:, None] + (k + o_k)[None, :], (k + o_k < K)[None, :], EVEN).to(dtype)
        raw = run_bits(p_row, k // RUN + tl.arange(0, b_k // RUN), words, BITS, RUN, EVEN)
        w = _weights(raw, row, k, p_c, p_t, p_book, K, s_cn, s_cp, s_cg, BITS, RUN, GROUP, SCALES, START, STEP, MEAN,
                     TYPES, EVEN, b_k // RUN)
        acc = tl.dot(x, tl.trans(tl.reshape(w.to(dtype), (b_n, b_k))), acc, input_precision="ieee")
    if WHOLE:
        acc /= tl.load(p_whole)
    store_tile(p_y, acc, M, N, s_ym, s_ys, b_m, b_n)


# -- launching --------------------------------------------------------------------------------------------------

Format = LevelsFormat | GridFormat


def constants(fmt: Format, columns: int) -> dict[str, object]:
    """What a format and its groups fix when a kernel is compiled."""
    out: dict[str, object] = {
        "BITS": fmt.code_bits, "RUN": RUNS[fmt.code_bits], "GROUP": 0 if fmt.groups(columns) == 1 else fmt.group_size,
        "SCALES": 0, "START": 0.0, "STEP": 0.0, "MEAN": False, "TYPES": 0, "WHOLE": False}
    if isinstance(fmt, GridFormat):
        return out | {"TYPES": 1 << fmt.type_bits, "WHOLE": fmt.has_global}
    basis = fmt.basis  # every scale begins alike and has a bit of its own, or there is one with all bits
    return out | {"SCALES": len(basis.start), "START": basis.start[0], "STEP": basis.steps[0][0], "MEAN": fmt.mean}


def gemv_tile(fmt: Format, rows: int) -> Tile:
    """That of integers where codes are used like these, one scale to a group; else the narrow one."""
    alike = isinstance(fmt, LevelsFormat) and len(fmt.basis.start) == 1
    return tile_for(rows, GEMV_TILES) if alike else GEMV_TILES[0][1]


def gemv(x: Tensor, packed: Tensor, coef: Tensor, kind: Tensor, book: Tensor, whole: Tensor, fmt: Format) -> Tensor:
    """``x (M, K) -> (M, N)`` for a few tokens; operands as in ``groups.py``."""
    (tokens, columns), (rows, words), tile = x.shape, packed.shape, gemv_tile(fmt, packed.shape[0])
    y = torch.empty(tokens, rows, dtype=x.dtype, device=x.device)
    group_gemv[(tokens, triton.cdiv(rows, tile.b_n))](
        x, packed, coef, kind, book, whole, y, rows, columns, words, x.stride(0), y.stride(0), *coef.stride(),
        **constants(fmt, columns), EVEN=columns % tile.b_k == 0, b_n=tile.b_n, b_r=tile.b_k // RUNS[fmt.code_bits],
        num_warps=tile.warps * 32 // WARP, num_stages=tile.stages)
    return y


def gemm(x: Tensor, packed: Tensor, coef: Tensor, kind: Tensor, book: Tensor, whole: Tensor, fmt: Format,
         split: int | None = None) -> Tensor:
    """``x (M, K) -> (M, N)`` for many tokens; ``split`` programs share a tile's columns (None: as many as help)."""
    (tokens, columns), (rows, words) = x.shape, packed.shape
    fixed, tile = constants(fmt, columns), tile_for(tokens, GEMM_TILES)

    def launch(y: Tensor, blocks: tuple[int, int], split: int, steps: int) -> None:
        group_gemm[(*blocks, split)](
            x, packed, coef, kind, book, whole, y, tokens, rows, columns, words, steps, x.stride(0), y.stride(1),
            y.stride(0), *coef.stride(), **fixed, EVEN=columns % (tile.b_k * split) == 0,
            WIDE=INTERPRET or x.dtype == torch.float32, b_m=tile.b_m, b_n=tile.b_n, b_k=tile.b_k,
            num_warps=tile.warps * 32 // WARP, num_stages=tile.stages)

    return split_product(x, rows, tile, split, launch)

"""The truth in plain torch: what packed integer weights mean, and the product with them in float32.

Every other kernel is compared with this file. It is also the fallback where no faster kernel runs, so it decodes a
bounded number of rows at a time and never holds a second copy of the weight beyond that.

Operands, the same for every kernel (strides are free, so a device may keep ``scale`` and ``zero`` column-major):

- ``packed (N, ceil(K*bits/32))`` int32: dense little-endian bit stream of the codes of a row, see ``quant/bitpack.py``;
- ``scale (N, G)`` float16, bfloat16 or float32: one per group of ``K / G`` columns;
- ``zero (N, G)`` uint8, or None for symmetric codes, whose zero is ``2**(bits-1)``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fewbits.quant.bitpack import unpack_rows

CHUNK_CODES = 1 << 21
"""Codes decoded at a time: 8 MB of int32 while unpacking, 8 MB of float32 afterwards."""


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: int) -> Tensor:
    """float32 ``(N, columns)``, equal to ``IntFormat.decode`` bit for bit."""
    out = torch.empty(packed.shape[0], columns, dtype=torch.float32, device=packed.device)
    for rows in row_chunks(packed.shape[0], columns):
        out[rows] = _decode(packed[rows], scale[rows], None if zero is None else zero[rows], bits, columns)
    return out


def matmul(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``x (M, K) @ dequantize(...).T`` in float32, returned as ``(M, N)`` in the dtype of ``x``."""
    wide = x.float()
    out = torch.empty(x.shape[0], packed.shape[0], dtype=x.dtype, device=x.device)
    for rows in row_chunks(packed.shape[0], x.shape[1]):
        weight = _decode(packed[rows], scale[rows], None if zero is None else zero[rows], bits, x.shape[1])
        out[:, rows] = (wide @ weight.T).to(x.dtype)
    return out


def row_chunks(rows: int, columns: int, codes: int = CHUNK_CODES) -> Iterator[slice]:
    """Slices over ``rows`` of about ``codes`` weights each, at least one row."""
    step = max(1, codes // max(columns, 1))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _decode(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: int) -> Tensor:
    rows, groups = scale.shape
    values = unpack_rows(packed, bits, columns).reshape(rows, groups, -1).float()
    values -= 1 << (bits - 1) if zero is None else zero.float().unsqueeze(-1)
    values *= scale.float().unsqueeze(-1)
    return values.view(rows, columns)

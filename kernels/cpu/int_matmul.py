"""The compiled CPU kernel behind torch tensors; operands as in ``kernels/reference.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels.cpu.build import load
from fewbits.kernels.reference import row_chunks

GEMV_TOKENS = 12
"""Up to here, decoding a row again for every 4 tokens beats a dense copy of it: they break even at 12 to 16 tokens
(benchmarks/kernel_cpu.py)."""

DENSE_CODES = 1 << 20
"""Weights made dense at a time for many tokens: 4 MB of float32, which stays in the cache until it is used."""

_SCALE_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


def available() -> bool:
    """Whether the library is there; compiles it the first time."""
    return load("int_matmul") is not None


def gemv(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``x (M, K) -> (M, N)`` straight from the packed codes; meant for small M."""
    library = load("int_matmul")
    assert library is not None, "ask available() first"
    tokens, columns = x.shape
    wide = x if x.dtype == torch.float32 else x.float()
    y = torch.empty(tokens, packed.shape[0], dtype=torch.float32)
    status = library.fewbits_gemv(
        wide.data_ptr(), packed.data_ptr(), scale.data_ptr(), _SCALE_KINDS[scale.dtype],
        None if zero is None else zero.data_ptr(), y.data_ptr(),
        tokens, packed.shape[0], columns, scale.shape[1], bits, torch.get_num_threads())
    if status:
        raise MemoryError(f"no memory for the product of {tokens} tokens with a {packed.shape[0]} x {columns} weight")
    return y if x.dtype == torch.float32 else y.to(x.dtype)


def dense(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    """``x (M, K) -> (M, N)`` through dense float32 blocks of rows, never the whole weight; meant for large M."""
    wide = x.float()
    y = torch.empty(x.shape[0], packed.shape[0], dtype=torch.float32)
    block = torch.empty(0)  # one buffer for every block: fresh pages cost more than decoding into them
    for rows in row_chunks(packed.shape[0], x.shape[1], DENSE_CODES):
        if block.numel() == 0:
            block = torch.empty(rows.stop, x.shape[1], dtype=torch.float32)
        weight = block[: rows.stop - rows.start]
        _decode(packed[rows], scale[rows], None if zero is None else zero[rows], bits, weight)
        torch.mm(wide, weight.T, out=y[:, rows])
    return y.to(x.dtype)


def dequantize(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: int) -> Tensor:
    """float32 ``(N, columns)``, equal to the reference bit for bit."""
    out = torch.empty(packed.shape[0], columns, dtype=torch.float32)
    _decode(packed, scale, zero, bits, out)
    return out


def _decode(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, out: Tensor) -> None:
    """Fill ``out (N, K)``, contiguous float32."""
    library = load("int_matmul")
    assert library is not None, "ask available() first"
    rows, columns = out.shape
    status = library.fewbits_dequantize(
        packed.data_ptr(), scale.data_ptr(), _SCALE_KINDS[scale.dtype], None if zero is None else zero.data_ptr(),
        out.data_ptr(), rows, columns, scale.shape[1], bits, torch.get_num_threads())
    if status:
        raise MemoryError(f"no memory to decode a {rows} x {columns} weight")

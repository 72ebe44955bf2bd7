"""The compiled product of vectors of columns behind torch tensors; see ``quant/formats/vq.py``.

Shapes: ``codes (N, places)`` uint8 or int32, ``books (places or 1, length, entries)`` float32, entries side by side.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels.cpu.build import load

GEMV_TOKENS = 8
"""A table for every token beats a dense copy of the weight up to 2 tokens for 576 rows, 9 for 1536, and more than 16
for a head of 49152 rows (one core, codebooks of 256). At 8 that head saves 70 ms, and 576 rows lose 0.2 ms."""


def available() -> bool:
    """Whether the compiled product is there; compiles it the first time."""
    return load("row_vector_matmul") is not None


def gemv(x: Tensor, codes: Tensor, books: Tensor) -> Tensor:
    """``x (M, K) -> (M, N)`` float32: every entry times the inputs of its place, and then sums over that table."""
    library = load("row_vector_matmul")
    assert library is not None, "ask available() first"
    wide, (rows, places), (_, length, entries) = x.float().contiguous(), codes.shape, books.shape
    table, y = torch.empty(places, entries, dtype=torch.float32), torch.empty(len(x), rows, dtype=torch.float32)
    library.fewbits_row_gemv(
        wide.data_ptr(), codes.data_ptr(), books.data_ptr(), table.data_ptr(), y.data_ptr(), len(x), rows, places,
        entries, length, len(books) == 1, codes.dtype == torch.int32, torch.get_num_threads())
    return y


def dequantize(codes: Tensor, books: Tensor) -> Tensor:
    """float32 ``(N, K)``, equal to the reference bit for bit."""
    library = load("row_vector_matmul")
    assert library is not None, "ask available() first"
    (rows, places), entries = codes.shape, books.mT.contiguous()
    out = torch.empty(rows, places * entries.shape[2], dtype=torch.float32)
    library.fewbits_row_dequantize(
        codes.data_ptr(), entries.data_ptr(), out.data_ptr(), rows, places, *entries.shape[1:], len(books) == 1,
        codes.dtype == torch.int32, torch.get_num_threads())
    return out

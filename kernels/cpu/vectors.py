"""The compiled product of vectors of rows behind torch tensors; see ``quant/formats/rvq.py`` and ``vq.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels.cpu.build import load

HEIGHTS = (2, 4, 8)
"""Rows of a vector that are compiled."""

GEMV_TOKENS = 12
"""Up to here, looking vectors up again for every 4 tokens beats a dense copy of the weight (2 high: up to 4)."""


def available() -> bool:
    """Whether the compiled products are there; compiles them the first time."""
    return load("vector_matmul") is not None


def gemv(x: Tensor, codes: Tensor, books: Tensor) -> Tensor:
    """``x (M, K) -> (M, N)`` float32, of ``codes (N / height, stages, K)`` and ``books (stages * entries, height)``."""
    library = load("vector_matmul")
    assert library is not None, "ask available() first"
    wide, books = x.float().contiguous(), books.float()
    stages, height = codes.shape[1], books.shape[1]
    y = torch.empty(len(x), len(codes) * height, dtype=torch.float32)
    library.fewbits_vector_gemv(
        wide.data_ptr(), codes.data_ptr(), books.data_ptr(), y.data_ptr(), len(x), y.shape[1], x.shape[1], height,
        stages, len(books) // stages, codes.dtype == torch.int32, torch.get_num_threads())
    return y


def dequantize(codes: Tensor, books: Tensor) -> Tensor:
    """float32 ``(N, K)``, equal to the reference bit for bit; shapes as in :func:`gemv`."""
    library = load("vector_matmul")
    assert library is not None, "ask available() first"
    books, (_, stages, columns) = books.float(), codes.shape
    out = torch.empty(len(codes) * books.shape[1], columns, dtype=torch.float32)
    library.fewbits_vector_dequantize(
        codes.data_ptr(), books.data_ptr(), out.data_ptr(), *out.shape, books.shape[1], stages, len(books) // stages,
        codes.dtype == torch.int32, torch.get_num_threads())
    return out

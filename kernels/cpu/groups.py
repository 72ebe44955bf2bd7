"""The compiled products of groups with tables of their own, behind torch tensors as in ``kernels/groups.py``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.kernels.cpu.build import load
from fewbits.kernels.cpu.int_matmul import DENSE_CODES
from fewbits.kernels.reference import row_chunks

GEMV_TOKENS = 16
"""Up to here, looking values up again for every 4 tokens beats a dense copy of them (benchmarks/kernel_cpu.py)."""

_LANES = 16


def available() -> bool:
    """Whether the compiled products are there; compiles them the first time."""
    return load("group_matmul") is not None


def gemv(x: Tensor, packed: Tensor, coef: Tensor, kind: Tensor, book: Tensor, whole: Tensor) -> Tensor:
    """``x (M, K) -> (M, N)`` float32, straight from the packed codes; meant for small M."""
    library = load("group_matmul")
    assert library is not None, "ask available() first"
    (tokens, columns), rows = x.shape, len(packed)
    wide = F.pad(x.float(), (0, -columns % _LANES)).contiguous()
    y = torch.empty(tokens, rows, dtype=torch.float32)
    wide_book = _repeated(book)
    status = library.fewbits_group_gemv(
        wide.data_ptr(), *_weight(packed, coef, kind, wide_book, whole), y.data_ptr(), tokens, wide.shape[1], rows,
        *_sizes(coef, book, columns), torch.get_num_threads())
    if status:
        raise MemoryError(f"no memory for the product of {tokens} tokens with a {rows} x {columns} weight")
    return y


def dense(x: Tensor, *operands: Tensor) -> Tensor:
    """``x (M, K) -> (M, N)`` float32 through dense blocks of rows, never the whole weight; meant for large M."""
    packed, coef, kind, book, whole = operands
    wide = x.float()
    y = torch.empty(len(x), len(packed), dtype=torch.float32)
    block = torch.empty(0)  # one buffer for every block: fresh pages cost more than decoding into them
    for rows in row_chunks(len(packed), x.shape[1], DENSE_CODES):
        if block.numel() == 0:
            block = torch.empty(rows.stop, x.shape[1], dtype=torch.float32)
        weight = block[: rows.stop - rows.start]
        _decode(packed[rows], coef[rows], kind[rows], book, whole, weight)
        torch.mm(wide, weight.T, out=y[:, rows])
    return y


def dequantize(packed: Tensor, coef: Tensor, kind: Tensor, book: Tensor, whole: Tensor) -> Tensor:
    """float32 ``(N, K)``, equal to the reference bit for bit."""
    out = torch.empty(len(packed), len(whole), dtype=torch.float32)
    _decode(packed, coef, kind, book, whole, out)
    return out


def _decode(packed: Tensor, coef: Tensor, kind: Tensor, book: Tensor, whole: Tensor, out: Tensor) -> None:
    """Fill ``out (N, K)``, contiguous float32."""
    library = load("group_matmul")
    assert library is not None, "ask available() first"
    rows, columns = out.shape
    wide_book = _repeated(book)
    status = library.fewbits_group_dequantize(
        *_weight(packed, coef, kind, wide_book, whole), out.data_ptr(), rows, *_sizes(coef, book, columns),
        torch.get_num_threads())
    if status:
        raise MemoryError(f"no memory to decode a {rows} x {columns} weight")


def _repeated(book: Tensor) -> Tensor:
    """``(kinds * P, 16)``: a look-up reads 4 bits of an index."""
    return book.repeat(1, _LANES // book.shape[1])


def _weight(packed: Tensor, coef: Tensor, kind: Tensor, book: Tensor, whole: Tensor) -> tuple:
    return (packed.data_ptr(), coef.data_ptr(), kind.data_ptr() if kind.shape[1] else None, book.data_ptr(),
            float(whole[0]), coef.dtype == torch.bfloat16)


def _sizes(coef: Tensor, book: Tensor, columns: int) -> tuple[int, int, int, int]:
    """K, G, P and the bits of a code."""
    return columns, coef.shape[2], coef.shape[1], book.shape[1].bit_length() - 1

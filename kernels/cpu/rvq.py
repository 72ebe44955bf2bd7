"""The compiled product of residual vector codes behind torch tensors; see ``quant/formats/rvq.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewbits.kernels.cpu.build import load

if TYPE_CHECKING:
    from fewbits.quant.formats.rvq import RVQFormat

GEMV_TOKENS = 12
"""Up to here, looking vectors up again for every 4 tokens beats a dense copy of the weight."""


def available() -> bool:
    """Whether the compiled product is there; compiles it the first time."""
    return load("rvq_matmul") is not None


def gemv(x: Tensor, packed: Tensor, fmt: RVQFormat) -> Tensor:
    """``x (M, K) -> (M, N)`` float32 straight from the codes ``packed (N / 8, bits, K)``."""
    library = load("rvq_matmul")
    assert library is not None, "ask available() first"
    wide, books = x.float().contiguous(), fmt.books(x.device)
    y = torch.empty(len(x), packed.shape[0] * fmt.height, dtype=torch.float32)
    library.fewbits_rvq_gemv(wide.data_ptr(), packed.data_ptr(), books.data_ptr(), y.data_ptr(), len(x), y.shape[1],
                             x.shape[1], fmt.bits, torch.get_num_threads())
    return y


def dequantize(packed: Tensor, fmt: RVQFormat) -> Tensor:
    """float32 ``(N, K)``, equal to the reference bit for bit."""
    library = load("rvq_matmul")
    assert library is not None, "ask available() first"
    books = fmt.books(packed.device)
    out = torch.empty(packed.shape[0] * fmt.height, packed.shape[2], dtype=torch.float32)
    library.fewbits_rvq_dequantize(packed.data_ptr(), books.data_ptr(), out.data_ptr(), *out.shape, fmt.bits,
                                   torch.get_num_threads())
    return out

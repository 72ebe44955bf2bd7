"""The compiled search and product of trellis codes behind torch tensors; see ``quant/formats/trellis.py``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fewbits.kernels.cpu.build import load

if TYPE_CHECKING:
    from fewbits.quant.formats.trellis import TrellisFormat

TILE = 256
"""Values that one circular string of bits stands for."""

GEMV_TOKENS = 12
"""Up to here, decoding a tile again for every 4 tokens beats a dense copy of the weight."""


def can_search() -> bool:
    """Whether the compiled search is there; compiles it the first time."""
    return load("viterbi") is not None


def available() -> bool:
    """Whether the compiled product is there; compiles it the first time."""
    return load("trellis_matmul") is not None


def search(values: Tensor, codebook: Tensor, code_bits: int) -> Tensor:
    """Codes uint8 ``(B, 256)`` of ``values (B, 256)``: what :func:`fewbits.quant.viterbi.search` finds, bit for bit."""
    library = load("viterbi")
    assert library is not None, "ask can_search() first"
    values, codebook = values.float().contiguous(), codebook.contiguous()
    codes = torch.empty(values.shape, dtype=torch.uint8)
    status = library.fewbits_viterbi(values.data_ptr(), codebook.data_ptr(), codes.data_ptr(), len(values),
                                     len(codebook).bit_length() - 1, code_bits, torch.get_num_threads())
    if status:
        raise MemoryError(f"no memory to search a trellis of {len(codebook)} states")
    return codes


def gemv(x: Tensor, packed: Tensor, fmt: TrellisFormat) -> Tensor:
    """``x (M, K) -> (M, N)`` float32 straight from the codes ``packed (N / 32, K / 8, 8 * code_bits)``."""
    library = load("trellis_matmul")
    assert library is not None, "ask available() first"
    wide = x.float().contiguous()
    y = torch.empty(len(x), packed.shape[0] * fmt.height, dtype=torch.float32)
    library.fewbits_trellis_gemv(wide.data_ptr(), packed.data_ptr(), y.data_ptr(), len(x), y.shape[1], x.shape[1],
                                 fmt.code_bits, fmt.state_bits, fmt.step, torch.get_num_threads())
    return y


def dequantize(packed: Tensor, fmt: TrellisFormat) -> Tensor:
    """float32 ``(N, K)``, equal to the reference bit for bit."""
    library = load("trellis_matmul")
    assert library is not None, "ask available() first"
    out = torch.empty(packed.shape[0] * fmt.height, packed.shape[1] * fmt.span, dtype=torch.float32)
    library.fewbits_trellis_dequantize(packed.data_ptr(), out.data_ptr(), *out.shape, fmt.code_bits, fmt.state_bits,
                                       fmt.step, torch.get_num_threads())
    return out

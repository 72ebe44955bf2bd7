"""The compiled product of pyramid vectors behind torch tensors; see ``quant/formats/pvq.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels.cpu.build import load

GEMV_TOKENS = 12
"""Up to here, converting a vector again for every 4 tokens beats a dense copy of the weight."""


def available() -> bool:
    """Whether the compiled product is there; compiles it the first time."""
    return load("pvq_matmul") is not None


def gemv(x: Tensor, points: Tensor, scale: Tensor) -> Tensor:
    """``x (M, K) -> (M, N)`` float32 from ``points (N / 16, K, 16)`` int8 and ``scale (N / 16, K)`` float32."""
    library = load("pvq_matmul")
    assert library is not None, "ask available() first"
    wide = x.float().contiguous()
    y = torch.empty(len(x), points.shape[0] * points.shape[2], dtype=torch.float32)
    library.fewbits_pvq_gemv(wide.data_ptr(), points.data_ptr(), scale.data_ptr(), y.data_ptr(), len(x), y.shape[1],
                             x.shape[1], torch.get_num_threads())
    return y


def dequantize(points: Tensor, scale: Tensor) -> Tensor:
    """float32 ``(N, K)``, equal to the reference bit for bit."""
    library = load("pvq_matmul")
    assert library is not None, "ask available() first"
    out = torch.empty(points.shape[0] * points.shape[2], points.shape[1], dtype=torch.float32)
    library.fewbits_pvq_dequantize(points.data_ptr(), scale.data_ptr(), out.data_ptr(), *out.shape,
                                   torch.get_num_threads())
    return out

"""Products with weights that are coded jointly (trellis, vectors), and the choice of who computes them.

As torch operators that take flat tensors and the name of a format, ``fewbits::coded_matmul`` and
``fewbits::coded_dequantize``, opaque to ``torch.compile`` and CUDA graphs. ``x`` is in the rotated basis already.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fewbits.kernels.cpu import rvq as cpu_rvq
from fewbits.kernels.cpu import trellis as cpu_trellis
from fewbits.quant.formats import parse_format
from fewbits.quant.formats.rvq import RVQFormat
from fewbits.quant.formats.trellis import TrellisFormat
from fewbits.quant.types import Format, Segment

CODED = (TrellisFormat, RVQFormat)
"""Families whose codes are one tensor, rows of tiles first."""


@dataclass(frozen=True)
class CodedKernel:
    """One way to compute ``y = x @ W.T``.

    Attributes:
        run: ``(x (M, K), packed, format) -> (M, N)``.
        family: the formats that it takes; None means any.
        device: type of the device it runs on; None means any.
        max_tokens: largest M it is chosen for; None means any.
        available: whether this machine has what it needs.
    """

    run: Callable[[Tensor, Tensor, Any], Tensor]
    family: type | None
    device: str | None
    max_tokens: int | None
    available: Callable[[], bool]


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton(module: str, name: str) -> Callable[[Tensor, Tensor, Any], Tensor]:
    def run(x: Tensor, packed: Tensor, fmt: Format) -> Tensor:
        # imported here, because Triton is an optional dependency
        return getattr(importlib.import_module(f"fewbits.kernels.{module}"), name)(x, packed, fmt)

    return run


def _dense(x: Tensor, packed: Tensor, fmt: Format) -> Tensor:
    return x.float() @ _dequantize(packed, fmt.name).T


def _reference(x: Tensor, packed: Tensor, fmt: Format) -> Tensor:
    return x.float() @ decoded(packed, fmt).T


CODED_KERNELS: dict[str, CodedKernel] = {
    "triton_trellis_gemv": CodedKernel(_triton("triton_trellis", "gemv"), TrellisFormat, "cuda", 2, _has_triton),
    "triton_trellis_gemm": CodedKernel(_triton("triton_trellis", "gemm"), TrellisFormat, "cuda", None, _has_triton),
    "triton_rvq_gemv": CodedKernel(_triton("triton_rvq", "gemv"), RVQFormat, "cuda", 2, _has_triton),
    "triton_rvq_gemm": CodedKernel(_triton("triton_rvq", "gemm"), RVQFormat, "cuda", None, _has_triton),
    "cpu_trellis_gemv": CodedKernel(cpu_trellis.gemv, TrellisFormat, "cpu", cpu_trellis.GEMV_TOKENS,
                                    cpu_trellis.available),
    "cpu_trellis_dense": CodedKernel(_dense, TrellisFormat, "cpu", None, cpu_trellis.available),
    "cpu_rvq_gemv": CodedKernel(cpu_rvq.gemv, RVQFormat, "cpu", cpu_rvq.GEMV_TOKENS, cpu_rvq.available),
    "cpu_rvq_dense": CodedKernel(_dense, RVQFormat, "cpu", None, cpu_rvq.available),
    "coded_reference": CodedKernel(_reference, None, None, None, lambda: True),
}
"""Name -> kernel, in order of preference; the last takes whatever the others do not."""


def select(fmt: Format, tokens: int, device: str) -> str:
    """Name of the kernel that multiplies so many tokens by a weight of this format on this type of device."""
    return next(name for name, k in CODED_KERNELS.items()
                if (k.family is None or isinstance(fmt, k.family)) and k.device in (None, device)
                and (k.max_tokens is None or tokens <= k.max_tokens) and k.available())


_LIB = torch.library.Library("fewbits", "FRAGMENT")
_LIB.define("coded_matmul(Tensor x, Tensor packed, str format) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define("coded_dequantize(Tensor packed, str format) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

_format = lru_cache(maxsize=256)(parse_format)


def _shape(packed: Tensor, fmt: Format) -> tuple[int, int]:
    """N and K of packed codes: tiles of rows come first, and columns last or before the words of a tile."""
    return packed.shape[0] * fmt.height, packed.shape[1 if isinstance(fmt, TrellisFormat) else 2] * fmt.span


def decoded(packed: Tensor, fmt: Format) -> Tensor:
    """float32 ``(N, K)`` by the format's own ``unpack`` and ``decode``."""
    shape = _shape(packed, fmt)
    (name,) = fmt.storage(*shape)
    return Segment(fmt, *fmt.unpack({name: packed}, *shape)).dequantize()


def _dequantize(packed: Tensor, format: str) -> Tensor:
    fmt = _format(format)
    if packed.device.type == "cpu":
        if isinstance(fmt, TrellisFormat) and cpu_trellis.available():
            return cpu_trellis.dequantize(packed.contiguous(), fmt)
        if isinstance(fmt, RVQFormat) and cpu_rvq.available():
            return cpu_rvq.dequantize(packed.contiguous(), fmt)
    return decoded(packed, fmt)


def _matmul(x: Tensor, packed: Tensor, format: str) -> Tensor:
    flat, fmt = x.reshape(-1, x.shape[-1]).contiguous(), _format(format)
    y = CODED_KERNELS[select(fmt, len(flat), x.device.type)].run(flat, packed.contiguous(), fmt)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


_LIB.impl("coded_matmul", _matmul, "CompositeExplicitAutograd")
_LIB.impl("coded_dequantize", _dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("fewbits::coded_matmul", lib=_LIB)
def _fake_matmul(x: Tensor, packed: Tensor, format: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], _shape(packed, _format(format))[0]))


@torch.library.register_fake("fewbits::coded_dequantize", lib=_LIB)
def _fake_dequantize(packed: Tensor, format: str) -> Tensor:
    return packed.new_empty(_shape(packed, _format(format)), dtype=torch.float32)


_MATMUL = torch.ops.fewbits.coded_matmul.default
_DEQUANTIZE = torch.ops.fewbits.coded_dequantize.default


class _Differentiable(torch.autograd.Function):
    """The product with a gradient for ``x`` alone."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, format: str) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.format = format
        return _MATMUL(x, packed, format)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (packed,) = ctx.saved_tensors
        return (grad.float() @ _DEQUANTIZE(packed, ctx.format)).to(grad.dtype), None, None


def matmul(x: Tensor, packed: Tensor, fmt: Format) -> Tensor:
    """``x (..., K)`` times the packed codes of a weight ``(N, K)``: ``(..., N)`` in the dtype of ``x``."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Differentiable.apply(x, packed, fmt.name)
    return _MATMUL(x, packed, fmt.name)


def dequantize(packed: Tensor, fmt: Format) -> Tensor:
    """float32 ``(N, K)`` in the rotated basis: exactly what the stored codes mean."""
    return _DEQUANTIZE(packed, fmt.name)

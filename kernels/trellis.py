"""Products with trellis codes, and the choice of who computes them.

As torch operators that take flat tensors, ``fewbits::trellis_matmul`` and ``fewbits::trellis_dequantize``, opaque to
``torch.compile`` and CUDA graphs. ``x`` is in the rotated basis already: the codes have no scale but ``step``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.kernels.cpu import trellis as cpu
from fewbits.quant.formats.trellis import TrellisFormat
from fewbits.quant.types import Segment


def _reference(x: Tensor, packed: Tensor, code_bits: int, state_bits: int, step: float) -> Tensor:
    return x.float() @ _decoded(packed, code_bits, state_bits).T


def _cpu_dense(x: Tensor, packed: Tensor, code_bits: int, state_bits: int, step: float) -> Tensor:
    return x.float() @ cpu.dequantize(packed, code_bits, state_bits, step).T


def _triton(name: str) -> Callable[..., Tensor]:
    def run(x: Tensor, packed: Tensor, code_bits: int, state_bits: int, step: float) -> Tensor:
        from fewbits.kernels import triton_trellis  # here, because Triton is an optional dependency

        return getattr(triton_trellis, name)(x, packed, code_bits, state_bits, step)

    return run


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@dataclass(frozen=True)
class TrellisKernel:
    """One way to compute ``y = x @ W.T``.

    Attributes:
        run: ``(x (M, K), packed, code_bits, state_bits, step) -> (M, N)``.
        device: type of the device it runs on; None means any.
        max_tokens: largest M it is chosen for; None means any.
        available: whether this machine has what it needs.
    """

    run: Callable[..., Tensor]
    device: str | None
    max_tokens: int | None
    available: Callable[[], bool]


TRELLIS_KERNELS: dict[str, TrellisKernel] = {
    "triton_trellis_gemv": TrellisKernel(_triton("gemv"), "cuda", 2, _has_triton),
    "triton_trellis_gemm": TrellisKernel(_triton("gemm"), "cuda", None, _has_triton),
    "cpu_trellis_gemv": TrellisKernel(cpu.gemv, "cpu", cpu.GEMV_TOKENS, cpu.available),
    "cpu_trellis_dense": TrellisKernel(_cpu_dense, "cpu", None, cpu.available),
    "trellis_reference": TrellisKernel(_reference, None, None, lambda: True),
}
"""Name -> kernel, in order of preference; the last takes whatever the others do not."""


def select(tokens: int, device: str) -> str:
    """Name of the kernel that multiplies so many tokens on this type of device."""
    return next(name for name, k in TRELLIS_KERNELS.items() if k.device in (None, device)
                and (k.max_tokens is None or tokens <= k.max_tokens) and k.available())


_LIB = torch.library.Library("fewbits", "FRAGMENT")
_LIB.define("trellis_matmul(Tensor x, Tensor packed, int code_bits, int state_bits) -> Tensor",
            tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define("trellis_dequantize(Tensor packed, int code_bits, int state_bits) -> Tensor",
            tags=(torch.Tag.pt2_compliant_tag,))


def _decoded(packed: Tensor, code_bits: int, state_bits: int) -> Tensor:
    fmt = TrellisFormat(code_bits, state_bits)
    rows, columns = packed.shape[0] * fmt.height, packed.shape[1] * fmt.span
    return Segment(fmt, *fmt.unpack({"weight_trellis": packed}, rows, columns)).dequantize()


def _dequantize(packed: Tensor, code_bits: int, state_bits: int) -> Tensor:
    if packed.device.type == "cpu" and cpu.available():
        return cpu.dequantize(packed.contiguous(), code_bits, state_bits, TrellisFormat(code_bits, state_bits).step)
    return _decoded(packed, code_bits, state_bits)


def _matmul(x: Tensor, packed: Tensor, code_bits: int, state_bits: int) -> Tensor:
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    kernel = TRELLIS_KERNELS[select(len(flat), x.device.type)]
    y = kernel.run(flat, packed.contiguous(), code_bits, state_bits, TrellisFormat(code_bits, state_bits).step)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


_LIB.impl("trellis_matmul", _matmul, "CompositeExplicitAutograd")
_LIB.impl("trellis_dequantize", _dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("fewbits::trellis_matmul", lib=_LIB)
def _fake_matmul(x: Tensor, packed: Tensor, code_bits: int, state_bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0] * TrellisFormat.height))


@torch.library.register_fake("fewbits::trellis_dequantize", lib=_LIB)
def _fake_dequantize(packed: Tensor, code_bits: int, state_bits: int) -> Tensor:
    shape = packed.shape[0] * TrellisFormat.height, packed.shape[1] * TrellisFormat.span
    return packed.new_empty(shape, dtype=torch.float32)


_MATMUL = torch.ops.fewbits.trellis_matmul.default
_DEQUANTIZE = torch.ops.fewbits.trellis_dequantize.default


class _Differentiable(torch.autograd.Function):
    """The product with a gradient for ``x`` alone."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, code_bits: int, state_bits: int) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.bits = code_bits, state_bits
        return _MATMUL(x, packed, code_bits, state_bits)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (packed,) = ctx.saved_tensors
        return (grad.float() @ _DEQUANTIZE(packed, *ctx.bits)).to(grad.dtype), None, None, None


def matmul(x: Tensor, packed: Tensor, fmt: TrellisFormat) -> Tensor:
    """``x (..., K)`` times the codes ``packed (N / 32, K / 8, 8 * code_bits)``: ``(..., N)`` in the dtype of ``x``."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Differentiable.apply(x, packed, fmt.code_bits, fmt.state_bits)
    return _MATMUL(x, packed, fmt.code_bits, fmt.state_bits)


def dequantize(packed: Tensor, fmt: TrellisFormat) -> Tensor:
    """float32 ``(N, K)`` in the rotated basis: exactly what the stored codes mean."""
    return _DEQUANTIZE(packed, fmt.code_bits, fmt.state_bits)

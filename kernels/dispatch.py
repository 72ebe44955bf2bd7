"""One interface to multiply by a quantized weight; which kernel runs is a choice of the table ``KERNELS``.

    prepared = prepare(fmt, tensors, rows, columns)   # once, after the tensors are on their device
    y = matmul(x, prepared)                           # (..., K) -> (..., N) in x.dtype, accumulated in float32
    dequantize(prepared), dequantize_rows(prepared, index)

Integer formats go through two torch operators that take flat tensors, ``fewbits::int_matmul`` and
``fewbits::int_dequantize``, so ``torch.compile`` and CUDA graphs see them as opaque nodes; the number of tokens is
looked at inside, when it is known. Other formats have operators in ``kernels/coded.py``; one that no kernel knows is
decoded by its own ``unpack`` and ``decode``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from fewbits.kernels import coded, reference
from fewbits.kernels.choice import TRITON_GEMV_TOKENS, from_triton, has_triton, pick
from fewbits.kernels.cpu import int_matmul as cpu
from fewbits.quant.bitpack import unpack_rows
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.types import Format, Segment, require_stored

Operands = tuple[Tensor, Tensor, Tensor | None]
"""``packed, scale, zero`` as described in ``reference.py``."""


@dataclass(frozen=True)
class Prepared:
    """A quantized weight ``(N, K)`` ready to be multiplied on the device of its tensors.

    Attributes:
        format: what the codes mean.
        rows: N.
        columns: K.
        tensors: the tensors of the checkpoint, shared and not copied.
        operands: for integer formats ``packed`` (shared with ``tensors``), ``scale`` and ``zero`` in the layout that
            the device reads best; None for the other formats.
        coded: for formats of ``kernels/coded.py``, what their kernels read.
    """

    format: Format
    rows: int
    columns: int
    tensors: Mapping[str, Tensor]
    operands: Operands | None
    coded: coded.Operands | None = None


@dataclass(frozen=True)
class Kernel:
    """One way to compute ``y = x @ dequantize(W).T`` for integer codes.

    Attributes:
        run: ``(x (M, K), packed, scale, zero, bits) -> (M, N)`` in the dtype of ``x``.
        device: type of the device it runs on; None means any.
        bits: code widths it takes.
        max_tokens: largest M it is chosen for; None means any.
        available: whether this machine has what it needs.
    """

    run: Callable[[Tensor, Tensor, Tensor, Tensor | None, int], Tensor]
    device: str | None
    bits: tuple[int, ...]
    max_tokens: int | None
    available: Callable[[], bool]


ALL_BITS = (1, 2, 3, 4, 5, 6, 7, 8)
TRITON_BITS = (1, 2, 3, 4, 8)

KERNELS: dict[str, Kernel] = {
    "triton_gemv": Kernel(from_triton("triton_int", "gemv"), "cuda", TRITON_BITS, TRITON_GEMV_TOKENS, has_triton),
    "triton_gemm": Kernel(from_triton("triton_int", "gemm"), "cuda", TRITON_BITS, None, has_triton),
    "cpu_gemv": Kernel(cpu.gemv, "cpu", ALL_BITS, cpu.GEMV_TOKENS, cpu.available),
    "cpu_dense": Kernel(cpu.dense, "cpu", ALL_BITS, None, cpu.available),
    "reference": Kernel(reference.matmul, None, ALL_BITS, None, lambda: True),
}
"""Name -> kernel, in order of preference; ``reference`` takes whatever the others do not."""


@lru_cache(maxsize=64)
def _candidates(device: str, bits: int) -> tuple[tuple[str, Kernel], ...]:
    """The kernels of the table that can run here, in order. Cached: this runs once per layer call."""
    return tuple((name, k) for name, k in KERNELS.items()
                 if k.device in (None, device) and bits in k.bits and k.available())


def _select(bits: int, tokens: int, device: str) -> tuple[str, Kernel]:
    return pick(_candidates(device, bits), tokens)


def select_kernel(format: Format, M: int, device: torch.device) -> str:
    """Name of the kernel that multiplies ``M`` tokens by a weight of this format on this device."""
    if coded.is_coded(format):
        return coded.select(format, M, device.type)
    if not isinstance(format, IntFormat):
        return "reference"
    return _select(format.code_bits, M, device.type)[0]


# -- operators --------------------------------------------------------------------------------------------------

_LIB = torch.library.Library("fewbits", "FRAGMENT")
_LIB.define("int_matmul(Tensor x, Tensor packed, Tensor scale, Tensor? zero, int bits) -> Tensor",
            tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define("int_dequantize(Tensor packed, Tensor scale, Tensor? zero, int bits, int columns) -> Tensor",
            tags=(torch.Tag.pt2_compliant_tag,))


def _int_matmul(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    shape = x.shape
    flat = x.reshape(-1, shape[-1]).contiguous()
    kernel = _select(bits, flat.shape[0], x.device.type)[1]
    return kernel.run(flat, packed, scale, zero, bits).view(*shape[:-1], packed.shape[0])


def _int_dequantize(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: int) -> Tensor:
    if packed.device.type == "cpu" and cpu.available():
        return cpu.dequantize(packed, scale, zero, bits, columns)
    return reference.dequantize(packed, scale, zero, bits, columns)


# One implementation for every device: the choice by device is the table's, not the dispatcher's.
_LIB.impl("int_matmul", _int_matmul, "CompositeExplicitAutograd")
_LIB.impl("int_dequantize", _int_dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("fewbits::int_matmul", lib=_LIB)
def _fake_matmul(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


@torch.library.register_fake("fewbits::int_dequantize", lib=_LIB)
def _fake_dequantize(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, columns: int) -> Tensor:
    return packed.new_empty((packed.shape[0], columns), dtype=torch.float32)


_MATMUL = torch.ops.fewbits.int_matmul.default
_DEQUANTIZE = torch.ops.fewbits.int_dequantize.default


class _Differentiable(torch.autograd.Function):
    """The product with a gradient for ``x`` alone: codes, scales and zero points are frozen."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int) -> Tensor:
        ctx.save_for_backward(packed, scale, zero)
        ctx.bits, ctx.columns = bits, x.shape[-1]
        return _MATMUL(x, packed, scale, zero, bits)

    @staticmethod
    def backward(ctx, grad: Tensor):
        packed, scale, zero = ctx.saved_tensors
        weight = _DEQUANTIZE(packed, scale, zero, ctx.bits, ctx.columns)
        return (grad.float() @ weight).to(grad.dtype), None, None, None, None


# -- the interface ----------------------------------------------------------------------------------------------


def prepare(fmt: Format, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Prepared:
    """Derive what the kernels read from the tensors of a checkpoint, on the device where they are.

    ``weight_packed`` is shared. Zero points are unpacked to uint8 ``(N, G)``; on a GPU they and the scales are copied
    column-major, since a kernel there reads one group of many rows at once. Make it again when the tensors move.

    Raises:
        FormatError: a tensor is missing, or has the wrong shape or dtype.
    """
    names = list(fmt.storage(rows, columns))
    if coded.is_coded(fmt):
        shared = {n: tensors[n] for n in names if n in tensors}
        return Prepared(fmt, rows, columns, shared, None, coded.operands(fmt, shared, rows, columns))
    if not isinstance(fmt, IntFormat):
        fmt.unpack(tensors, rows, columns)  # raises if they do not fit
        return Prepared(fmt, rows, columns, {n: tensors[n] for n in names}, None)
    require_stored(fmt.name, fmt.storage(rows, columns), tensors, any_float=True)
    shared = {n: tensors[n] for n in names}
    scale, zero = shared["weight_scale"], None
    if not fmt.symmetric:
        zero = unpack_rows(shared["weight_zero_point"].T.contiguous(), fmt.code_bits, rows)  # (G, N)
        zero = zero.T if scale.is_cuda else zero.T.contiguous()
    if scale.is_cuda:
        scale = scale.T.contiguous().T
    operands = (shared["weight_packed"].contiguous(), scale if scale.is_cuda else scale.contiguous(), zero)
    return Prepared(fmt, rows, columns, shared, operands)


def matmul(x: Tensor, prepared: Prepared) -> Tensor:
    """``x (..., K)`` float32, bfloat16 or float16 times the weight: ``(..., N)`` in the dtype of ``x``.

    Accumulates in float32. ``x`` may require a gradient; the weight is frozen.

    Raises:
        ValueError: the last dimension of ``x`` is not K, or its dtype is none of the three.
    """
    if x.shape[-1] != prepared.columns:
        raise ValueError(f"x: got {x.shape[-1]} columns, the weight needs {prepared.columns}")
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x: got {x.dtype}, needed float32, bfloat16 or float16; cast it with x.float()")
    if prepared.coded is not None:
        return coded.matmul(x, prepared.coded, prepared.format)
    if prepared.operands is None:
        return (x.float() @ dequantize(prepared).T).to(x.dtype)
    packed, scale, zero = prepared.operands
    bits = prepared.format.code_bits
    if x.requires_grad and torch.is_grad_enabled():
        return _Differentiable.apply(x, packed, scale, zero, bits)
    return _MATMUL(x, packed, scale, zero, bits)


def dequantize(prepared: Prepared) -> Tensor:
    """float32 ``(N, K)``: exactly what the stored codes mean."""
    if prepared.coded is not None:
        return coded.dequantize(prepared.coded, prepared.format)
    if prepared.operands is None:
        segment = Segment(prepared.format, *prepared.format.unpack(prepared.tensors, prepared.rows, prepared.columns))
        return segment.dequantize()
    packed, scale, zero = prepared.operands
    return _DEQUANTIZE(packed, scale, zero, prepared.format.code_bits, prepared.columns)


def dequantize_rows(prepared: Prepared, index: Tensor) -> Tensor:
    """float32 ``(*index.shape, K)``: rows ``index`` (integers in ``[0, N)``) of the weight, for embeddings."""
    if prepared.coded is not None:
        return coded.dequantize_rows(prepared.coded, prepared.format, index)
    if prepared.operands is None:
        return dequantize(prepared)[index]
    packed, scale, zero = prepared.operands
    flat = index.reshape(-1)
    picked = None if zero is None else zero.index_select(0, flat)
    rows = _DEQUANTIZE(packed.index_select(0, flat), scale.index_select(0, flat), picked, prepared.format.code_bits,
                       prepared.columns)
    return rows.view(*index.shape, prepared.columns)

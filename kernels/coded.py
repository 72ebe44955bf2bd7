"""Products with weights of formats beyond integers, and the choice of who computes them: levels and tables of groups,
and what is coded jointly (trellis, vectors, lattices).

As torch operators that take flat tensors and the name of a format, ``fewbits::coded_matmul`` and
``fewbits::coded_dequantize``, opaque to ``torch.compile`` and CUDA graphs. ``x`` is in the basis of the codes already.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fewbits.kernels import groups
from fewbits.kernels.choice import TRITON_GEMV_TOKENS, from_triton, has_triton, pick
from fewbits.kernels.cpu import groups as cpu_groups
from fewbits.kernels.cpu import pvq as cpu_pvq
from fewbits.kernels.cpu import row_vectors as cpu_row_vectors
from fewbits.kernels.cpu import trellis as cpu_trellis
from fewbits.kernels.cpu import vectors as cpu_vectors
from fewbits.quant.formats import parse_format
from fewbits.quant.formats.fairy import FairyFormat, real_form
from fewbits.quant.formats.grid import GridFormat
from fewbits.quant.formats.joint import summed
from fewbits.quant.formats.levels import LevelsFormat
from fewbits.quant.formats.pvq import PVQFormat
from fewbits.quant.formats.rvq import RVQFormat
from fewbits.quant.formats.trellis import TrellisFormat
from fewbits.quant.formats.vq import CodebookFormat, LowRankVQFormat, ProductFormat, RowVectors, VQFormat
from fewbits.quant.types import Format

Operands = list[Tensor]
"""What kernels read of a weight: see :func:`operands`."""


@dataclass(frozen=True)
class Family:
    """How a family of formats is computed.

    Attributes:
        operands: ``(tensors of a checkpoint, format, rows, columns)`` to what kernels read.
        shape: ``(operands, format)`` to N and K.
        decode: ``(operands, format)`` to float32 ``(N, K)``: the truth, in torch.
        compiled: the same in C, where there is a compiler.
        per_row: how many of the operands, from the first, have the rows of the weight; 0: a row needs others to decode.
    """

    operands: Callable[[Mapping[str, Tensor], Any, int, int], Operands]
    shape: Callable[[Operands, Any], tuple[int, int]]
    decode: Callable[[Operands, Any], Tensor]
    compiled: Callable[[Operands, Any], Tensor]
    per_row: int = 0


def _as_stored(tensors: Mapping[str, Tensor], fmt: Any, rows: int, columns: int) -> Operands:
    fmt.unpack(tensors, rows, columns)  # raises if they do not fit
    return [t.contiguous() for t in tensors.values()]


def _decode_stored(operands: Operands, fmt: Any) -> Tensor:
    shape = FAMILIES[type(fmt)].shape(operands, fmt)
    return fmt.decode(fmt.unpack(dict(zip(fmt.storage(*shape), operands)), *shape)[0], {})


def _points(tensors: Mapping[str, Tensor], fmt: PVQFormat, rows: int, columns: int) -> Operands:
    """Ranks take a walk through a table to decode, so that is done once: a byte a weight from then on."""
    return [t.contiguous() for t in fmt.pulses(fmt.unpack(tensors, rows, columns)[0])]


def _universal(tensors: Mapping[str, Tensor], fmt: RVQFormat, rows: int, columns: int) -> Operands:
    """Codes, and the codebooks that all weights share, in float16."""
    fmt.unpack(tensors, rows, columns)
    codes = tensors["weight_codes"].contiguous()
    return [codes, fmt.books(codes.device, torch.float16).flatten(0, 1)]


def _vectors(tensors: Mapping[str, Tensor], fmt: VQFormat, rows: int, columns: int) -> Operands:
    """Codes ``(N / length, stages, K)``, and the codebooks one below the other, in float16."""
    codes, params = fmt.unpack(tensors, rows, columns)
    return [codes.view(-1, fmt.stages, columns).contiguous(), params["codebook"][0].contiguous()]


def _looked_up(tensors: Mapping[str, Tensor], fmt: RowVectors, rows: int, columns: int) -> Operands:
    """Codes ``(N, places)``, and float32 ``(places or 1, length, entries)``: entries side by side."""
    codes, params = fmt.unpack(tensors, rows, columns)
    return [codes.contiguous(), fmt.books(params).mT.contiguous()]


def _complex_tiles(tensors: Mapping[str, Tensor], fmt: FairyFormat, rows: int, columns: int) -> Operands:
    """One index a tile ``(N / 2, K / 2)``, and what stands in either row of a tile, float32 ``(1, 2, entries)`` each.

    So the even rows of the weight, and the odd ones, are vectors of two columns with the same codes. An index takes a
    byte, and four of three stages.
    """
    codes, params = fmt.unpack(tensors, rows, columns)
    of_u, of_v = fmt.indexes(codes)
    u, v = (torch.view_as_complex(book) for book in fmt.books(params))
    entries = len(u)
    every = real_form(u.expand(entries, -1), v[:, None].expand(-1, entries)).view(entries, 2, entries, 2)
    books = every.permute(1, 3, 0, 2).flatten(2)[:, None]
    upper, lower = torch.nn.functional.pad(books, (0, -books.shape[3] % 64)).contiguous()  # the compiled step
    return [(of_u + entries * of_v).to(torch.uint8 if entries <= 16 else torch.int32), upper, lower]


def _interleaved(rows: Iterable[Tensor], dim: int) -> Tensor:
    """The upper rows of tiles and the lower ones in their places; ``dim`` is that of rows."""
    return torch.stack(list(rows), dim + 1).flatten(dim, dim + 1)


def _both_rows(run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor, Operands, Any], Tensor]:
    """A product with vectors of columns, done for the even and for the odd rows of complex tiles."""
    return lambda x, o, f: _interleaved((run(x, o[0], book) for book in o[1:]), 1)


FAMILIES: dict[type, Family] = {
    **{family: Family(
        operands, lambda o, f: (o[0].shape[0], o[4].shape[0]), lambda o, f: groups.decode(*o),
        lambda o, f: cpu_groups.dequantize(*o), per_row=groups.PER_ROW)
       for family, operands in ((LevelsFormat, groups.levels), (GridFormat, groups.grid))},
    TrellisFormat: Family(
        _as_stored, lambda o, f: (o[0].shape[0] * f.height, o[0].shape[1] * f.span), _decode_stored,
        lambda o, f: cpu_trellis.dequantize(o[0], f)),
    **{family: Family(
        operands, lambda o, f: (o[0].shape[0] * f.height, o[0].shape[2]),
        lambda o, f: summed(o[0].flatten(0, 1), o[1].float().unflatten(0, (f.depth, -1))),
        lambda o, f: cpu_vectors.dequantize(*o))
       for family, operands in ((RVQFormat, _universal), (VQFormat, _vectors))},
    **dict.fromkeys((ProductFormat, LowRankVQFormat), Family(
        _looked_up, lambda o, f: (o[0].shape[0], o[0].shape[1] * f.length), lambda o, f: f.looked_up(o[0], o[1].mT),
        lambda o, f: cpu_row_vectors.dequantize(*o), per_row=1)),
    PVQFormat: Family(
        _points, lambda o, f: (o[0].shape[0] * f.height, o[0].shape[1]), lambda o, f: f.dense(*o),
        lambda o, f: cpu_pvq.dequantize(*o)),
    FairyFormat: Family(
        _complex_tiles, lambda o, f: (o[0].shape[0] * f.height, o[0].shape[1] * f.span),
        lambda o, f: _interleaved((book[0].T[o[0].long()].flatten(1) for book in o[1:]), 0),
        lambda o, f: _interleaved((cpu_row_vectors.dequantize(o[0], book) for book in o[1:]), 0)),
}


@dataclass(frozen=True)
class CodedKernel:
    """One way to compute ``y = x @ W.T``.

    Attributes:
        run: ``(x (M, K), operands, format) -> (M, N)``.
        family: the formats that it takes; None means any.
        device: type of the device it runs on; None means any.
        max_tokens: largest M it is chosen for; None means any.
        available: whether this machine has what it needs.
        fits: whether it takes a format of the family.
    """

    run: Callable[[Tensor, Operands, Any], Tensor]
    family: type | tuple[type, ...] | None
    device: str | None
    max_tokens: int | None
    available: Callable[[], bool]
    fits: Callable[[Any], bool] = lambda fmt: True

    def takes(self, fmt: Format) -> bool:
        return self.family is None or (isinstance(fmt, self.family) and self.fits(fmt))


def _triton(module: str, name: str, *, of_format: bool = False) -> Callable[[Tensor, Operands, Any], Tensor]:
    """``of_format``: the operands do not say everything, so it is given the format too."""
    run = from_triton(f"triton_{module}", name)
    return lambda x, operands, fmt: run(x, *operands, *([fmt] if of_format else []))


_GROUPED = (LevelsFormat, GridFormat)


def _even(fmt: RVQFormat | VQFormat) -> bool:
    return fmt.height in cpu_vectors.HEIGHTS


def _small_table(fmt: RowVectors) -> bool:
    """Whether the products of inputs and entries are at most 4 KB a column, and so less than most weights."""
    return fmt.entries <= 1024 * fmt.length


def _up_to_a_byte(fmt: FairyFormat) -> bool:
    """Whether a table of the 16 or 256 tiles times their inputs is less than the weight; 4096 of them are more."""
    return fmt.stages < 3


def _dense(x: Tensor, operands: Operands, fmt: Format) -> Tensor:
    return x.float() @ FAMILIES[type(fmt)].compiled(operands, fmt).T


def _rounded(x: Tensor, operands: Operands, fmt: Format) -> Tensor:
    return x @ FAMILIES[type(fmt)].decode(operands, fmt).to(x.dtype).T


def _reference(x: Tensor, operands: Operands, fmt: Format) -> Tensor:
    return x.float() @ FAMILIES[type(fmt)].decode(operands, fmt).T


CODED_KERNELS: dict[str, CodedKernel] = {
    "triton_group_gemv": CodedKernel(_triton("groups", "gemv", of_format=True), _GROUPED, "cuda", TRITON_GEMV_TOKENS,
                                     has_triton),
    "triton_group_gemm": CodedKernel(_triton("groups", "gemm", of_format=True), _GROUPED, "cuda", None, has_triton),
    "cpu_group_gemv": CodedKernel(lambda x, o, f: cpu_groups.gemv(x, *o), _GROUPED, "cpu", cpu_groups.GEMV_TOKENS,
                                  cpu_groups.available),
    "cpu_group_dense": CodedKernel(lambda x, o, f: cpu_groups.dense(x, *o), _GROUPED, "cpu", None,
                                   cpu_groups.available),
    "triton_trellis_gemv": CodedKernel(_triton("trellis", "gemv", of_format=True), TrellisFormat, "cuda",
                                       TRITON_GEMV_TOKENS, has_triton),
    "triton_trellis_gemm": CodedKernel(_triton("trellis", "gemm", of_format=True), TrellisFormat, "cuda", None,
                                       has_triton),
    "triton_vector_gemv": CodedKernel(_triton("vectors", "gemv"), (RVQFormat, VQFormat), "cuda", TRITON_GEMV_TOKENS,
                                      has_triton, _even),
    "triton_vector_gemm": CodedKernel(_triton("vectors", "gemm"), (RVQFormat, VQFormat), "cuda", None, has_triton,
                                      _even),
    "triton_row_gemv": CodedKernel(_triton("row_vectors", "gemv"), RowVectors, "cuda",
                                   TRITON_GEMV_TOKENS, has_triton, _small_table),
    "triton_fairy_gemv": CodedKernel(_both_rows(from_triton("triton_row_vectors", "gemv")), FairyFormat, "cuda",
                                     TRITON_GEMV_TOKENS, has_triton, _up_to_a_byte),
    "triton_pvq_gemv": CodedKernel(_triton("pvq", "gemv"), PVQFormat, "cuda", TRITON_GEMV_TOKENS,
                                       has_triton),
    "triton_pvq_gemm": CodedKernel(_triton("pvq", "gemm"), PVQFormat, "cuda", None,
                                       has_triton),
    "cpu_trellis_gemv": CodedKernel(lambda x, o, f: cpu_trellis.gemv(x, o[0], f), TrellisFormat, "cpu",
                                    cpu_trellis.GEMV_TOKENS, cpu_trellis.available),
    "cpu_trellis_dense": CodedKernel(_dense, TrellisFormat, "cpu", None, cpu_trellis.available),
    "cpu_vector_gemv": CodedKernel(lambda x, o, f: cpu_vectors.gemv(x, *o), (RVQFormat, VQFormat), "cpu",
                                   cpu_vectors.GEMV_TOKENS, cpu_vectors.available, _even),
    "cpu_vector_dense": CodedKernel(_dense, (RVQFormat, VQFormat), "cpu", None, cpu_vectors.available, _even),
    "cpu_row_gemv": CodedKernel(lambda x, o, f: cpu_row_vectors.gemv(x, *o), RowVectors, "cpu",
                                cpu_row_vectors.GEMV_TOKENS, cpu_row_vectors.available, _small_table),
    "cpu_row_dense": CodedKernel(_dense, RowVectors, "cpu", None, cpu_row_vectors.available),
    "cpu_fairy_gemv": CodedKernel(_both_rows(lambda x, codes, book: cpu_row_vectors.gemv(x, codes, book)), FairyFormat,
                                  "cpu", cpu_row_vectors.GEMV_TOKENS, cpu_row_vectors.available, _up_to_a_byte),
    "cpu_fairy_dense": CodedKernel(_dense, FairyFormat, "cpu", None, cpu_row_vectors.available),
    "cpu_pvq_gemv": CodedKernel(lambda x, o, f: cpu_pvq.gemv(x, *o), PVQFormat, "cpu", cpu_pvq.GEMV_TOKENS,
                                cpu_pvq.available),
    "cpu_pvq_dense": CodedKernel(_dense, PVQFormat, "cpu", None, cpu_pvq.available),
    "cuda_codebook_dense": CodedKernel(_rounded, (CodebookFormat, FairyFormat), "cuda", None, lambda: True),
    "coded_reference": CodedKernel(_reference, None, None, None, lambda: True),
}
"""Name -> kernel, in order of preference; the last takes whatever the others do not."""


@lru_cache(maxsize=64)
def _candidates(fmt: Format, device: str) -> tuple[tuple[str, CodedKernel], ...]:
    """The kernels of the table that can run here, in order. Cached: this runs once per layer call."""
    return tuple((name, k) for name, k in CODED_KERNELS.items()
                 if k.takes(fmt) and k.device in (None, device) and k.available())


def select(fmt: Format, tokens: int, device: str) -> str:
    """Name of the kernel that multiplies so many tokens by a weight of this format on this type of device."""
    return pick(_candidates(fmt, device), tokens)[0]


_LIB = torch.library.Library("fewbits", "FRAGMENT")
_LIB.define("coded_matmul(Tensor x, Tensor[] operands, str format) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIB.define("coded_dequantize(Tensor[] operands, str format) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))

_format = lru_cache(maxsize=256)(parse_format)


def _matmul(x: Tensor, operands: Operands, format: str) -> Tensor:
    flat, fmt = x.reshape(-1, x.shape[-1]).contiguous(), _format(format)
    _, kernel = pick(_candidates(fmt, x.device.type), len(flat))
    y = kernel.run(flat, operands, fmt)
    return y.view(*x.shape[:-1], -1).to(x.dtype)


def _dequantize(operands: Operands, format: str) -> Tensor:
    fmt = _format(format)
    compiled = select(fmt, 1 << 30, operands[0].device.type).startswith("cpu")
    return (FAMILIES[type(fmt)].compiled if compiled else FAMILIES[type(fmt)].decode)(operands, fmt)


_LIB.impl("coded_matmul", _matmul, "CompositeExplicitAutograd")
_LIB.impl("coded_dequantize", _dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("fewbits::coded_matmul", lib=_LIB)
def _fake_matmul(x: Tensor, operands: Operands, format: str) -> Tensor:
    fmt = _format(format)
    return x.new_empty((*x.shape[:-1], FAMILIES[type(fmt)].shape(operands, fmt)[0]))


@torch.library.register_fake("fewbits::coded_dequantize", lib=_LIB)
def _fake_dequantize(operands: Operands, format: str) -> Tensor:
    fmt = _format(format)
    return operands[0].new_empty(FAMILIES[type(fmt)].shape(operands, fmt), dtype=torch.float32)


_MATMUL = torch.ops.fewbits.coded_matmul.default
_DEQUANTIZE = torch.ops.fewbits.coded_dequantize.default


class _Differentiable(torch.autograd.Function):
    """The product with a gradient for ``x`` alone."""

    @staticmethod
    def forward(ctx, x: Tensor, format: str, *operands: Tensor) -> Tensor:
        ctx.save_for_backward(*operands)
        ctx.format = format
        return _MATMUL(x, list(operands), format)

    @staticmethod
    def backward(ctx, grad: Tensor):
        weight = _DEQUANTIZE(list(ctx.saved_tensors), ctx.format)
        return (grad.float() @ weight).to(grad.dtype), None, *(None for _ in ctx.saved_tensors)


def is_coded(fmt: Format) -> bool:
    return type(fmt) in FAMILIES


def operands(fmt: Format, tensors: Mapping[str, Tensor], rows: int, columns: int) -> Operands:
    """What the kernels read, from the tensors of a checkpoint; raises FormatError when they do not fit."""
    return FAMILIES[type(fmt)].operands(tensors, fmt, rows, columns)


def matmul(x: Tensor, operands: Operands, fmt: Format) -> Tensor:
    """``x (..., K)`` times the weight: ``(..., N)`` in the dtype of ``x``."""
    if x.requires_grad and torch.is_grad_enabled():
        return _Differentiable.apply(x, fmt.name, *operands)
    return _MATMUL(x, operands, fmt.name)


def dequantize(operands: Operands, fmt: Format) -> Tensor:
    """float32 ``(N, K)`` in the basis of the codes: exactly what they mean."""
    return _DEQUANTIZE(operands, fmt.name)


def dequantize_rows(operands: Operands, fmt: Format, index: Tensor) -> Tensor:
    """float32 ``(*index.shape, K)``; other rows are decoded only where a format codes some of them together."""
    per_row = FAMILIES[type(fmt)].per_row
    if not per_row:
        return dequantize(operands, fmt)[index]
    flat = index.reshape(-1)
    rows = dequantize([t.index_select(0, flat) for t in operands[:per_row]] + operands[per_row:], fmt)
    return rows.view(*index.shape, rows.shape[1])

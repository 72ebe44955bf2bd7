"""Codebooks of joint formats: made from the weight, and refitted to its codes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from fewbits.quant.formats.vq import CodebookFormat, stored_book
from fewbits.quant.types import Layout, Params, QuantizedTensor, Segment

Codebooks = dict[int, Params]
"""First column of a run -> what its rows share."""

_CHUNK_WEIGHTS = 1 << 21
_STEPS = 20
_ENOUGH = 1e-8  # of the squared residual of the normal equations


def has_codebooks(layout: Layout) -> bool:
    return any(isinstance(fmt, CodebookFormat) for fmt, _ in layout.runs)


def fit_codebooks(weight: Tensor, importance: Tensor | None, layout: Layout) -> Codebooks:
    """Of every run of ``weight (N, K)`` whose rows share parameters, errors weighed by ``importance (K,)``."""
    out: Codebooks = {}
    start = 0
    for fmt, columns in layout.runs:
        own = slice(start, start + columns)
        if fmt.joint:
            out[start] = fmt.fit(weight[:, own], None if importance is None else importance[own])
        else:
            out[start] = fmt.shared(weight[:, own])
        start += columns
    return out


def refit_codebooks(
    made: QuantizedTensor, targets: Callable[[], Iterable[Tensor]], hessian: Tensor, codebooks: Codebooks
) -> Codebooks:
    """Codebooks that make ``tr((W - Q) H (W - Q)^T)`` least for the codes of ``made``, one run after another.

    With ``Q = D(c)``, linear in the codebook c, these are the normal equations ``D^T(D(c) H) = D^T(W H)``; conjugate
    gradients solve them for the change of c, without ever forming the matrix.

    Args:
        made: the codes, in the basis of ``hessian``.
        targets: the rows of W from top to bottom, in blocks.
        hessian: ``(K, K)``, positive definite.
    """
    out, start = dict(codebooks), 0
    for segment in made.segments:
        own = slice(start, start + segment.columns)
        start = own.stop
        if isinstance(segment.format, CodebookFormat):
            change = _refit(made, segment, own, targets(), hessian)
            book = stored_book(segment.params["codebook"].float() + change)
            out[own.start] = {**segment.params, "codebook": book}
            made = with_codebooks(made, out)
    return out


def _refit(
    made: QuantizedTensor, segment: Segment, own: slice, targets: Iterable[Tensor], hessian: Tensor
) -> Tensor:
    """The best change of the codebook of one segment of ``made``, whose columns are ``own``."""
    fmt, codes = segment.format, segment.codes
    assert isinstance(fmt, CodebookFormat)
    step = max(1, _CHUNK_WEIGHTS // segment.columns // fmt.height)

    def pulled(blocks: Iterable[Tensor]) -> Tensor:
        """``D^T`` of an ``(N, columns)`` that comes in blocks of rows."""
        total, at = torch.zeros(segment.params["codebook"].shape, device=codes.device), 0
        for block in blocks:
            n = len(block) // fmt.height * fmt.depth
            total += fmt.adjoint(codes[at : at + n], block, segment.params)
            at += n
        return total

    def normal(change: Tensor) -> Tensor:
        moved = {**segment.params, "codebook": change}
        return pulled(fmt.decode(part, moved) @ hessian[own, own] for part in codes.split(step * fmt.depth))

    def residuals() -> Iterator[Tensor]:
        at = 0
        for target in targets:
            rows = made.rows(slice(at, at + len(target)))
            yield (target - rows.dequantize()) @ hessian[:, own]
            at += len(target)

    every = hessian.diagonal()[own].expand(segment.rows, -1)
    return conjugate_gradients(normal, pulled(residuals()), pulled(every.split(step * fmt.height)))


def with_codebooks(made: QuantizedTensor, codebooks: Codebooks) -> QuantizedTensor:
    """The same codes with other codebooks."""
    segments, start = [], 0
    for segment in made.segments:
        params = codebooks.get(start, segment.params) if segment.format.joint else segment.params
        segments.append(Segment(segment.format, segment.codes, params))
        start += segment.columns
    return QuantizedTensor(made.shape, tuple(segments))


def conjugate_gradients(matrix: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor) -> Tensor:
    """``x`` with ``matrix(x) = right``, nearly: at most 20 steps from 0, preconditioned by a ``diagonal`` >= 0.

    Where the diagonal is 0 (an entry that no code uses) x stays 0.
    """
    inverse = torch.where(diagonal > 0, 1 / diagonal.clamp(min=1e-30), torch.zeros_like(diagonal))
    x, residual = torch.zeros_like(right), right.clone()
    direction = inverse * residual
    power = first = float((residual * direction).sum())
    for _ in range(_STEPS):
        if not power > _ENOUGH * first:
            break
        image = matrix(direction)
        length = power / float((direction * image).sum())
        x += length * direction
        residual -= length * image
        scaled = inverse * residual
        before, power = power, float((residual * scaled).sum())
        direction = scaled + power / before * direction
    return x

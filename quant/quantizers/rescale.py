"""All scales of a row fitted at once to its codes, against the full Hessian.

With the codes frozen a row is ``q = theta D``, linear in its scales and means ``theta``: one row of ``D`` for each
parameter of each group, zero outside it. The best of them solve ``(D H D^T) theta = D H w^T``; this generalizes the
alignment of PT2-LLM (arXiv 2510.03267, eq. 12), which does one group at a time, to all groups of a row.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fewbits.quant.formats.scalar import ScalarFormat
from fewbits.quant.types import Params, QuantizedTensor, Segment

_RIDGE = 1e-4
"""Of the mean of the diagonal, towards the parameters there were: float16 rounds them to about that."""
_CHUNK_WEIGHTS = 1 << 20

Design = list[tuple[int, str, int, Tensor]]
"""Segment, parameter, first column, and what it multiplies ``(n, G, g)``."""


def rescaled(made: QuantizedTensor, targets: Iterable[Tensor], hessian: Tensor) -> QuantizedTensor:
    """The same codes with the scales that make ``tr((W - Q) H (W - Q)^T)`` least, in the dtypes that are stored.

    A row that rounding of its new scales makes worse keeps the old ones.

    Args:
        made: segments alone, in the basis of ``hessian``.
        targets: the rows of W from top to bottom, in blocks.
        hessian: ``(K, K)``, positive definite.
    """
    parts, at = [], 0
    for block in targets:
        for target in block.split(max(1, _CHUNK_WEIGHTS // block.shape[1])):
            if any(s.format.height > 1 for s in made.segments):
                return made  # rows are no matter of their own
            parts.append(_rescale_rows(made.rows(slice(at, at + len(target))), target, hessian))
            at += len(target)
    return QuantizedTensor.concat_rows(parts)


def _rescale_rows(made: QuantizedTensor, target: Tensor, hessian: Tensor) -> QuantizedTensor:
    design = _design(made)
    if not design:
        return made
    error = target - made.dequantize()
    rows, pulled = len(target), error @ hessian
    gram, right = [], []
    for _, _, start, part in design:
        groups, size = part.shape[1:]
        own = slice(start, start + groups * size)
        right.append((part * pulled[:, own].view(rows, groups, size)).sum(-1))
        for g in range(groups):
            first = start + g * size
            reach = part[:, g] @ hessian[first : first + size]  # (n, K)
            gram.append(torch.cat([
                (other * reach[:, s : s + other.shape[1] * other.shape[2]].view_as(other)).sum(-1)
                for _, _, s, other in design], 1))
    matrix = torch.stack(gram, 1)
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    diagonal += _RIDGE * diagonal.mean(1, keepdim=True) + 1e-30
    change = torch.linalg.solve_ex(matrix, torch.cat(right, 1))[0]
    better = _moved(made, design, change)
    left = target - better.dequantize()
    keep = ((left @ hessian) * left).sum(1) >= (pulled * error).sum(1)
    keep |= ~change.isfinite().all(1)
    return _choose_rows(keep, made, better)


def _design(made: QuantizedTensor) -> Design:
    out: Design = []
    start = 0
    for i, segment in enumerate(made.segments):
        if isinstance(fmt := segment.format, ScalarFormat):
            codes = segment.codes.view(segment.rows, fmt.groups(segment.columns), -1)
            parts = fmt.linear(codes, {k: v.unsqueeze(-1) for k, v in segment.params.items()})
            out += [(i, name, start, part.expand_as(codes).contiguous()) for name, part in parts.items()]
        start += segment.columns
    return out


def _moved(made: QuantizedTensor, design: Design, change: Tensor) -> QuantizedTensor:
    """Parameters plus their share of ``change (n, P)``, as stored. A scale keeps its sign."""
    params: list[dict[str, Tensor]] = [dict(s.params) for s in made.segments]
    at = 0
    for i, name, _, part in design:
        old, groups = params[i][name], part.shape[1]
        new = (old.float() + change[:, at : at + groups].nan_to_num()).to(old.dtype)
        flipped = (new.sign() != old.sign()) & (name != "mean")
        params[i][name] = old.where(flipped | ~new.isfinite(), new)
        at += groups
    return _with_params(made, params)


def _choose_rows(keep: Tensor, old: QuantizedTensor, new: QuantizedTensor) -> QuantizedTensor:
    params: list[dict[str, Tensor]] = []
    for a, b in zip(old.segments, new.segments):
        joint = a.format.joint
        params.append({k: v if joint else v.where(keep[:, None], b.params[k]) for k, v in a.params.items()})
    return _with_params(old, params)


def _with_params(made: QuantizedTensor, params: list[dict[str, Tensor]]) -> QuantizedTensor:
    def with_own(segment: Segment, own: Params) -> Segment:
        return Segment(segment.format, segment.codes, own)

    return QuantizedTensor(made.shape, tuple(map(with_own, made.segments, params)))

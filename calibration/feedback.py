"""What error feedback will lose on a tensor with a format, without running it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.quant.quantizers.codebooks import Codebooks, fit_codebooks
from fewbits.quant.quantizers.fit import fit_layout
from fewbits.quant.quantizers.gptq import reverse_cholesky, revived
from fewbits.quant.quantizers.lowrank import low_rank
from fewbits.quant.rotation import choose_rotation, rotate, rotate_stats, rotated_back
from fewbits.quant.types import LayerStats, Layout, Segment, natural_columns

SAMPLED_ROWS = 128
"""Rows of a matrix that a damage is estimated from; the rest is taken to be like them."""

ROTATED_ROWS = 32
"""The same in a rotated basis, where rows are more alike; they must be those of a tile."""


def sample_rows(matrix: Tensor) -> Tensor:
    """Every so many rows of ``(N, ...)``, spread over all of them."""
    return matrix[:: max(1, matrix.shape[0] // SAMPLED_ROWS)]


def conditional_curvature(stats: LayerStats, damp: float = 0.01) -> tuple[Tensor, Tensor, Tensor]:
    """``D (K,)``, ``diag(H) (K,)`` and the dead inputs: ``D_j = R_jj^2`` of ``H = R R^T`` in act-order.

    Each is by column, in the columns' own order. A dead input has no D: what multiplies it changes nothing.
    """
    diagonal = stats.xtx.diagonal() / max(stats.n_tokens, 1)
    dead, importance = diagonal <= 0, revived(diagonal)
    order = torch.argsort(importance, descending=True, stable=True)
    lower, _ = reverse_cholesky(stats.xtx, max(stats.n_tokens, 1), order, damp)
    conditional = torch.empty_like(importance)
    conditional[order] = lower.diagonal().flip(0).square()
    return conditional.masked_fill_(dead, 0), importance, dead


def column_shares(stats: LayerStats, group: int) -> list[float]:
    """How a tensor's damage spreads over groups of its sorted columns: in proportion to the sum of ``D_j``.

    At one width a column loses ``D_j |v_j - q_j|^2``, and rounding errors are alike wherever the grid is (BAQ,
    arXiv 2506.05664).
    """
    conditional, _, _ = conditional_curvature(stats)
    sums = torch.stack([part.sum() for part in conditional[stats.column_order()].double().split(group)])
    return (sums / sums.sum().clamp(min=1e-300)).tolist()


def feedback_damage(
    weight: Tensor, stats: LayerStats, layouts: Sequence[Layout], curvature: Tensor | None, *, damp: float = 0.01
) -> list[float]:
    """What GPTQ's output error will cost with each layout: ``1/2 sum_ij c_i D_j E_ij^2``, nats per token.

    The loss of error feedback is ``sum_j D_j |v_j - q_j|^2`` (GPTQ's own identity), and the rounding errors of the
    compensated weights ``v`` are about those of plain rounding on the same grid. So one factorization and one rounding
    per layout do for a whole run of the quantizer.

    Args:
        weight: ``(N, K)``, of which ``SAMPLED_ROWS`` are looked at.
        curvature: ``c (N,)`` of :func:`fewbits.calibration.curvature.output_curvature`; None counts all rows alike.
    """
    conditional, importance, dead = conditional_curvature(stats, damp)
    basis = _Rotated.of(weight, stats, damp) if any(layout.rotated for layout in layouts) else None
    c = torch.ones(weight.shape[0], device=weight.device) if curvature is None else curvature
    rows, own = sample_rows(weight).float().masked_fill(dead, 0), sample_rows(c)
    scale = 0.5 * float(c.sum() / own.sum().clamp(min=1e-30))
    importance = importance.masked_fill(dead, 0)  # sorted last, as the quantizers have them

    def damage(layout: Layout) -> float:
        if layout.rotated and basis is not None:
            return basis.damage(layout, c)
        if layout.whole:  # neighbouring rows, and codebooks that are made for all of them
            every = weight.float().masked_fill(dead, 0)
            return 0.5 * float(c @ ((every - rounded(every, importance, layout)).square() @ conditional))
        return scale * float(own @ ((rows - rounded(rows, importance, layout)).square() @ conditional))

    return [damage(layout) for layout in layouts]


@dataclass(frozen=True)
class _Rotated:
    """A weight in the basis of rotated layouts, where the errors of all rows are alike.

    Attributes:
        weight: as it is coded, ``(N, K)``.
        factor: ``R (K, K)`` of the Hessian of the rotated inputs, ``H = R R^T``.
        out_scale: ``(N,)``: errors in row i are larger by it once they are rotated back.
    """

    weight: Tensor
    factor: Tensor
    out_scale: Tensor

    @staticmethod
    def of(weight: Tensor, stats: LayerStats, damp: float) -> _Rotated:
        weight = weight.float().masked_fill(stats.xtx.diagonal() <= 0, 0)
        rotation = choose_rotation(weight, stats, seed=0)
        inputs, order = rotate_stats(stats, rotation), torch.arange(weight.shape[1], device=weight.device)
        lower, _ = reverse_cholesky(inputs.xtx, max(stats.n_tokens, 1), order, damp)
        return _Rotated(rotate(weight, rotation), lower.flip(0, 1), rotation.out_scale.float())

    def damage(self, layout: Layout, c: Tensor) -> float:
        """``1/2 sum_i c_i out_i^2 sum_j D_j E[e_j^2]``; of columns coded jointly, D is the diagonal of a block."""
        spans = [fmt.span for fmt, columns in layout.runs for _ in range(columns // fmt.span)]
        conditional, i = torch.empty_like(self.factor[0]), 0
        for span in spans:
            own = slice(i, i + span)
            conditional[own] = self.factor[own, own].square().sum(1)
            i += span
        rows = self.weight[: -(-ROTATED_ROWS // layout.height) * layout.height]
        codebooks = fit_codebooks(self.weight, None, layout)
        error = (rows - _nearest(rows, None, layout, codebooks)).square().mean(0)
        return 0.5 * float(c @ self.out_scale.square()) * float(error @ conditional)


def rounded(weight: Tensor, importance: Tensor | None, layout: Layout) -> Tensor:
    """``weight (N, K)`` rounded to the nearest values of a layout, its grid fitted as the quantizers fit it.

    Without ``importance`` there is nothing to sort columns by: they stay as they come.
    """
    if layout.low_rank:
        codes = rounded(weight, importance, dataclasses.replace(layout, low_rank=0))
        stats = None if importance is None else LayerStats(importance.diag(), 1)
        return codes + low_rank(weight - codes, stats, layout.low_rank).dense()
    if layout.permuted:
        plain = dataclasses.replace(layout, permuted=False)
        if importance is None:
            return rounded(weight, None, plain)
        order = torch.argsort(importance, descending=True, stable=True)
        return natural_columns(rounded(weight[:, order], importance[order], plain), order)
    if layout.rotated:
        rotation = choose_rotation(weight, None, seed=0)
        return rotated_back(_nearest(rotate(weight, rotation), None, layout), rotation)
    return _nearest(weight, importance, layout)


def _nearest(
    weight: Tensor, importance: Tensor | None, layout: Layout, codebooks: Codebooks | None = None
) -> Tensor:
    """The nearest values of the runs of a layout, in whatever order and basis ``weight`` is."""
    runs = []
    for (fmt, columns), params, start in fit_layout(weight, importance, layout, codebooks):
        runs.append(Segment.nearest(fmt, weight[:, start : start + columns], params).dequantize())
    return runs[0] if len(runs) == 1 else torch.cat(runs, dim=1)

"""GPTQ (arXiv 2210.17323) in its feedback form, with act-order over static groups and QEP (arXiv 2504.09629).

Column by column, in order of importance, each weight is rounded after adding what the errors of the columns before it
imply through the Hessian. With ``H = R R^T`` (R upper triangular: a Cholesky factor read backwards) and
``A = R / diag(R)``, the value rounded at column k is

    v_k = w_k + sum_{j<k} (w_j - q_j) A_jk

(columns that are coded jointly make one k: ``diag(R)`` then has blocks, and this is the LDLQ of QuIP#)
so the weights themselves never change and no inverse is needed. It gives the same integers as the error-push form of
the paper. Groups are fitted beforehand on the original weights (static), so the order of the sweep costs nothing at run
time: no permutation and no group index is stored for it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from fewbits.quant.errors import FewbitsError
from fewbits.quant.quantizers.codebooks import (
    Codebooks,
    fit_codebooks,
    has_codebooks,
    refit_codebooks,
    with_codebooks,
)
from fewbits.quant.quantizers.fit import Fit, Scales, fit_layout, in_coded_basis
from fewbits.quant.quantizers.rescale import rescaled
from fewbits.quant.quantizers.rtn import Clip
from fewbits.quant.types import LayerStats, Layout, QuantizedTensor, Segment, permuted

log = logging.getLogger(__name__)

_DAMP_STEP = 10**0.5
_MAX_DAMP = 10.0
_CHUNK_WEIGHTS = 1 << 21


@dataclass(frozen=True)
class GPTQ:
    """GPTQ.

    Attributes:
        damp: added to the diagonal of the Hessian, as a fraction of its mean. Escalates by sqrt(10) if the
            factorization breaks down; the value it ended with is reported as ``damp``.
        act_order: sweep columns by falling ``diag(H)``.
        coarse_first: sweep runs of columns whose codes have fewer bits before others, which then take up their errors.
        clip: ``search`` shrinks group ranges to minimize the error weighted by ``diag(H)``.
        qep: strength in [0, 1] of the correction towards the outputs of the original model; 0 is off.
        qep_damp: damping of the correction's own solve.
        refits: how often codebooks are fitted to their codes and the codes swept anew; a last fit follows.
        rescale: fit all scales (and means) of a row at once to its codes, at the end.
        scales: of layouts with ``scl:``: ``fit`` for the least error, ``inputs`` to even out the inputs by powers of
            two, for engines that round these too.
        block_size: columns per lazy update. Speed only.
    """

    damp: Annotated[float, Field(ge=0, le=10)] = 0.01
    act_order: bool = True
    coarse_first: bool = False
    clip: Clip = "search"
    qep: Annotated[float, Field(ge=0, le=1)] = 0.0
    qep_damp: Annotated[float, Field(ge=0)] = 1.0
    refits: Annotated[int, Field(ge=0)] = 1
    rescale: bool = False
    scales: Scales = "fit"
    block_size: Annotated[int, Field(ge=1)] = 128

    needs_stats = True
    stacks = True

    def quantize(
        self, weight: Tensor, stats: LayerStats | None, layout: Layout, *, seed: int = 0
    ) -> tuple[QuantizedTensor, dict[str, float]]:
        """Quantize ``weight (N, K)``, of any float dtype, with the statistics of its input.

        Rows are independent of one another given the Hessian, and are done a chunk at a time to bound memory.

        Raises:
            FewbitsError: no statistics, or a Hessian that no damping can factor.
        """
        if stats is None or stats.n_tokens == 0:
            raise FewbitsError("gptq: got no calibration tokens for this tensor; give more text, or keep the tensor")
        return in_coded_basis(self._quantize, weight, stats, layout, seed, self.scales)

    def _quantize(
        self, weight: Tensor, stats: LayerStats | None, layout: Layout
    ) -> tuple[QuantizedTensor, dict[str, float]]:
        assert stats is not None
        diagonal = stats.xtx.diagonal() / stats.n_tokens
        dead, importance = diagonal <= 0, revived(diagonal)
        joint = any(fmt.span > 1 for fmt, _ in layout.runs)  # columns that are coded jointly stay side by side
        order = torch.arange(len(dead), device=dead.device)
        if self.act_order and not joint:
            order = torch.argsort(importance, descending=True, stable=True)
        if self.coarse_first and not joint:
            bits = torch.tensor([fmt.code_bits for fmt, n in layout.runs for _ in range(n)], device=order.device)
            order = order[torch.argsort(bits[order], stable=True)]
        correction = self._correction(stats) if self.qep > 0 and stats.cross is not None else None
        lower, damp = reverse_cholesky(stats.xtx, stats.n_tokens, order, self.damp)
        facts = {"damp": damp}
        blocks = weight.split(max(1, _CHUNK_WEIGHTS // (weight.shape[1] * layout.height)) * layout.height)

        def pairs() -> Iterator[tuple[Tensor, Tensor]]:
            """Rows of the weight, and what is rounded for them."""
            for rows in blocks:
                original = rows.float().masked_fill(dead, 0)
                if correction is None:
                    yield original, original
                else:
                    yield original, torch.addmm(original, original, correction).masked_fill(dead, 0)

        grids: list[list[Fit]] = []  # of the original weights, whatever is rounded on them; codebooks come and go

        def sweep(books: Codebooks) -> QuantizedTensor:
            parts, moved, size = [], 0.0, 0.0
            for i, (original, target) in enumerate(pairs()):
                if i == len(grids):
                    weighed = importance if self.clip == "search" else None
                    grids.append(list(fit_layout(original, weighed, layout, books)))
                fits = [(run, books[start] if run[0].joint else params, start) for run, params, start in grids[i]]
                parts.append(self._quantize_rows(target, fits, lower, order))
                if correction is not None:
                    moved += float((target - original).square().sum())
                    size += float(original.square().sum())
            if correction is not None:
                facts["qep_shift"] = (moved / size) ** 0.5 if size else 0.0
            return QuantizedTensor.concat_rows(parts)

        books = fit_codebooks(weight, importance, layout)
        made = sweep(books)
        if not (has_codebooks(layout) or self.rescale):
            return made, facts
        hessian = stats.hessian
        hessian.diagonal().copy_(importance + damp * importance.mean())
        if has_codebooks(layout):

            def refit() -> Codebooks:
                return refit_codebooks(made, lambda: (target for _, target in pairs()), hessian, books)

            for _ in range(self.refits):
                books = refit()
                made = sweep(books)
            made = with_codebooks(made, refit())
        if self.rescale:
            made = rescaled(made, (target for _, target in pairs()), hessian)
        return made, facts

    def _quantize_rows(self, target: Tensor, fits: list[Fit], lower: Tensor, order: Tensor) -> QuantizedTensor:
        columns = []
        for (fmt, n), params, _ in fits:
            for g in range(groups := fmt.groups(n)):
                own = slice(g, g + 1) if fmt.joint else (slice(None), g)
                shared = (fmt, {k: v[own].float().contiguous() for k, v in params.items()})
                columns += [shared] * (n // groups)
        swept = self._sweep(target.T.index_select(0, order), lower, [columns[i] for i in order.tolist()])
        codes = dict(zip(order.tolist(), swept))
        segments = tuple(
            Segment(fmt, torch.cat([codes[k] for k in range(start, start + n, fmt.span)], 1), params)
            for (fmt, n), params, start in fits
        )
        return QuantizedTensor((target.shape[0], target.shape[1]), segments)

    def _sweep(self, target: Tensor, lower: Tensor, columns: list[tuple]) -> list[Tensor]:
        """Codes of ``target (K, N)`` (transposed, so that a column of W is contiguous), for every column a tensor.

        Columns that are coded jointly have theirs at the first of them, and nothing at the others.
        ``lower (K, K)`` is R with both axes reversed; it is read in slices, because a second matrix of that size is
        what decides how much memory a large layer needs.
        """
        n = target.shape[0]
        error = torch.zeros_like(target)
        none = torch.empty(0, dtype=torch.uint8, device=target.device)
        codes = [none] * n
        span = max(fmt.span for fmt, _ in columns)
        block_size = -(-self.block_size // span) * span
        for a in range(0, n, block_size):
            b = min(a + block_size, n)
            # A[:b, a:b], unit upper triangular in its last rows
            feedback = _over_diagonal(lower[n - b :, n - b : n - a].flip(0, 1), [fmt.span for fmt, _ in columns[a:b]])
            value = torch.addmm(target[a:b], feedback[:a].T, error[:a])  # what earlier blocks imply
            inner = feedback[a:].T.contiguous()
            k = a
            while k < b:
                i, (fmt, params) = k - a, columns[k]
                if not fmt.joint:
                    v = torch.addmv(value[i], error[a:k].T, inner[i, :i]) if i else value[i]
                    code = fmt.encode(v, params)
                    codes[k] = code[:, None]
                    torch.sub(target[k], fmt.decode(code, params), out=error[k])
                else:
                    own = slice(k, k + fmt.span)
                    v = torch.addmm(value[i : i + fmt.span], inner[i : i + fmt.span, :i], error[a:k])
                    codes[k] = code = fmt.encode(v.T, params)
                    torch.sub(target[own], fmt.decode(code, params).T, out=error[own])
                k += fmt.span
        return codes

    def _correction(self, stats: LayerStats) -> Tensor:
        """``qep C H^-1`` with ``C = E[(x~ - x) x^T]``: W plus W times this has the least-squares original outputs."""
        assert stats.cross is not None
        hessian = stats.hessian
        hessian.diagonal().copy_(revived(hessian.diagonal()))
        hessian.diagonal().add_(self.qep_damp * hessian.diagonal().mean())
        return self.qep * torch.linalg.solve(hessian, stats.cross / stats.n_tokens, left=False)


def _over_diagonal(factor: Tensor, spans: list[int]) -> Tensor:
    """``factor (b, c)``, the columns of R that a lazy update takes, over the diagonal blocks of its last ``c`` rows.

    The blocks are those of the columns that are coded jointly: ``A = R / diag(R)`` where each is coded by itself.
    """
    top = len(factor) - len(spans)
    if max(spans) == 1:
        return factor / factor[top:].diagonal()
    out, i = torch.empty_like(factor), 0
    while i < len(spans):
        span = slice(i, i + spans[i])
        block = factor[top + i : top + span.stop, span]
        out[:, span] = torch.linalg.solve_triangular(block, factor[:, span], upper=True, left=False)
        i = span.stop
    return out


def reverse_cholesky(xtx: Tensor, n_tokens: int, order: Tensor, damp: float) -> tuple[Tensor, float]:
    """Factor the damped Hessian, columns in ``order``: ``R R^T = H + damp mean(diag H) I``, R upper triangular.

    Returns R with both axes reversed (a lower triangular matrix), which is how a Cholesky factor of the reversed
    matrix comes, and the damping that it took. A dead input (zero diagonal) gets the mean of the others.

    In exact arithmetic no ``R_jj^2`` can fall below the damping; when one does (or is not finite) the factor is
    redone in float64, and then with sqrt(10) times the damping, logged each time.

    Raises:
        FewbitsError: the Hessian is not finite, or no damping up to 10 makes it positive definite.
    """
    diagonal = revived(xtx.diagonal() / n_tokens)
    mean = float(diagonal.mean())
    if not bool(torch.isfinite(xtx.sum())):
        raise FewbitsError("hessian: got NaN or Inf in the calibration statistics; check the model and the text")
    backwards, first = order.flip(0), damp
    while damp <= _MAX_DAMP:
        floor = damp * mean
        for dtype in (torch.float32, torch.float64):
            hessian = permuted(xtx, backwards, dtype).div_(n_tokens)
            hessian.diagonal().copy_(diagonal[backwards] + floor)
            # in place: column-major, as LAPACK wants it, is the transpose of a symmetric matrix
            info = torch.zeros((), dtype=torch.int32, device=xtx.device)
            lower, _ = torch.linalg.cholesky_ex(hessian.T, out=(hessian.T, info))
            pivots = lower.diagonal()
            if not info and bool(torch.isfinite(pivots).all()) and bool((pivots.square() >= 0.5 * floor).all()):
                if damp > first:
                    log.warning("damping raised from %g to %g: the Hessian is nearly singular", first, damp)
                return lower.float(), damp
        damp = max(damp, 1e-6) * _DAMP_STEP
    raise FewbitsError(f"hessian: not positive definite even with damping {_MAX_DAMP}; check the calibration text")


def revived(diagonal: Tensor) -> Tensor:
    """The diagonal of a Hessian, where dead inputs get the mean of the others: it leaves the damping as it is."""
    dead = diagonal <= 0
    return diagonal.masked_fill(dead, 1.0 if bool(dead.all()) else float(diagonal[~dead].mean()))

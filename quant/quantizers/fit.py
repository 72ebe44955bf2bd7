"""What quantizers share: static group parameters, fitted once on the original weights, and the basis of the codes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fewbits.quant.errors import FewbitsError
from fewbits.quant.quantizers.codebooks import Codebooks
from fewbits.quant.quantizers.lowrank import beside_low_rank
from fewbits.quant.rotation import choose_rotation, choose_scales, fold_exponents, rotate, rotate_stats, storable
from fewbits.quant.types import Format, LayerStats, Layout, Params, QuantizedTensor, proxy_loss

# The clip search goes over its data about a hundred times: a chunk of this many weights stays in a core's cache, and
# is too small for torch to split over threads, so that chunks can be spread over threads instead.
_CHUNK_WEIGHTS = 1 << 15


Fit = tuple[tuple[Format, int], Params, int]
"""``((format, columns), params, first column)`` of a run."""


def fit_layout(
    weight: Tensor, importance: Tensor | None, layout: Layout, codebooks: Codebooks | None = None
) -> Iterator[Fit]:
    """For each run of columns of ``weight (N, K)``.

    Args:
        importance: ``(K,)`` weighs the squared error of each column in the clip search; None covers the full range.
        codebooks: what rows share, as it is of more rows than these; None: of these.
    """
    start = 0
    for fmt, columns in layout.runs:
        own = slice(start, start + columns)
        if not fmt.joint:
            shared = fmt.shared(weight[:, own]) if codebooks is None else codebooks.get(start, {})
            params = _fit_groups(fmt, weight[:, own], None if importance is None else importance[own], shared)
        elif codebooks is None:
            params = fmt.fit(weight[:, own], None if importance is None else importance[own])
        else:
            params = codebooks[start]
        yield (fmt, columns), params, start
        start = own.stop


def _fit_groups(fmt: Format, weight: Tensor, importance: Tensor | None, shared: Params) -> Params:
    """``(N, G)`` each, a few rows at a time."""
    rows, columns = weight.shape
    groups = fmt.groups(columns)
    run = weight.reshape(rows, groups, -1)
    run_importance = None if importance is None else importance.reshape(groups, -1)
    step = max(1, _CHUNK_WEIGHTS // columns)
    with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
        chunks = [run[i : i + step] for i in range(0, rows, step)]
        parts = list(pool.map(partial(fmt.fit, **shared), chunks, [run_importance] * len(chunks)))
    return {k: torch.cat([p[k] for p in parts]) for k in parts[0]}


Core = Callable[[Tensor, LayerStats | None, Layout], tuple[QuantizedTensor, dict[str, float]]]
"""A quantizer that looks at the runs of a layout and at nothing else."""


Scales = Literal["fit", "inputs"]
"""What scales of a scaled weight are for: the least error, or even inputs, for engines that round these too."""


def in_coded_basis(
    core: Core, weight: Tensor, stats: LayerStats | None, layout: Layout, seed: int, scales: Scales = "fit"
) -> tuple[QuantizedTensor, dict[str, float]]:
    """Sort and rotate the columns as the layout says, quantize, and say in the result how to undo it.

    With a term of low rank, this is done to what the term leaves.

    What transforms the weight transforms its statistics too.

    Raises:
        FewbitsError: no statistics to sort by.
    """
    if layout.low_rank:
        return beside_low_rank(partial(in_coded_basis, core, seed=seed, scales=scales), weight, stats, layout)
    order = None
    if layout.permuted:
        if stats is None or stats.n_tokens == 0:
            raise FewbitsError("layout: got columns to sort (perm:) and no calibration tokens to sort them by; give "
                               "more text, keep the tensor, or plan it without perm:")
        order = stats.column_order()
        weight, stats = weight[:, order], stats.permuted(order)
    if not layout.own_basis:
        weight = weight.float() if stats is None else weight.float().masked_fill(stats.xtx.diagonal() <= 0, 0)
        fold = layout.scaled and scales == "inputs"
        if layout.rotated:
            rotation = choose_rotation(weight, stats, seed)
        elif fold and stats is not None:
            rotation = fold_exponents(weight, stats)
        else:
            rotation = choose_scales(weight, stats)
        coded, facts = core(rotate(weight, rotation), None if stats is None else rotate_stats(stats, rotation), layout)
        made = dataclasses.replace(coded, rotation=rotation)
        if stats is not None and stats.cross is None:
            for _ in range(_SCALE_ROUNDS if layout.scaled and not fold else 0):
                made = _refit_rows(weight, _refit_columns(weight, made, stats), stats)
            made = _refit_rows(weight, made, stats)
    else:
        made, facts = core(weight, stats, layout)
    return (made if order is None else dataclasses.replace(made, permutation=order)), facts


_SCALE_ROUNDS = 2


def _refit_columns(weight: Tensor, made: QuantizedTensor, stats: LayerStats) -> QuantizedTensor:
    """The column scales ``c`` that make the output error least, given codes and row scales.

    With the rows ``q_i`` of ``diag(out) Q`` they solve ``(sum_i q_i^T q_i * H) c = sum_i q_i * (w_i H)``: exact, where
    PTQ1.61 learns them by gradient from the output of a whole block.
    """
    rotation = made.rotation
    assert rotation is not None
    q = made.dequantize() / rotation.in_scale.float()
    hessian = stats.xtx / stats.n_tokens
    matrix = (q.T @ q) * hessian
    ridge = 0.01 * hessian.diagonal().mean() * q.square().sum(0) + 1e-30  # the damping of the sweep
    right = (q * (weight @ hessian)).sum(0) + ridge * rotation.in_scale.float()
    matrix.diagonal().add_(ridge)
    scale, info = torch.linalg.solve_ex(matrix, right)
    if int(info) or not bool(scale.isfinite().all()):
        return made
    scale = storable(scale.where(scale.sign() == rotation.in_scale.sign(), rotation.in_scale.float()))
    better = dataclasses.replace(made, rotation=dataclasses.replace(rotation, in_scale=scale))
    return better if proxy_loss(weight, better, stats)[0] < proxy_loss(weight, made, stats)[0] else made


def _refit_rows(weight: Tensor, made: QuantizedTensor, stats: LayerStats) -> QuantizedTensor:
    """Every row times the factor that makes its output error least, given the codes: ``w H q^T / q H q^T``."""
    rotation = made.rotation
    assert rotation is not None
    q = made.dequantize()
    outputs = q @ stats.xtx
    power = (outputs * q).sum(1)
    factor = ((outputs * weight).sum(1) / power).where(power > 0, torch.ones_like(power)).clamp(0.5, 2)
    out_scale = storable(rotation.out_scale.float() * factor)
    return dataclasses.replace(made, rotation=dataclasses.replace(rotation, out_scale=out_scale))

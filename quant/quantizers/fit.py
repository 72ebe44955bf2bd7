"""What quantizers share: static group parameters, fitted once on the original weights, and sorted columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fewbits.quant.errors import FewbitsError
from fewbits.quant.types import Format, LayerStats, Layout, QuantizedTensor, Quantizer

# The clip search goes over its data about a hundred times: a chunk of this many weights stays in a core's cache, and
# is too small for torch to split over threads, so that chunks can be spread over threads instead.
_CHUNK_WEIGHTS = 1 << 15


def fit_layout(
    weight: Tensor, importance: Tensor | None, layout: Layout
) -> Iterator[tuple[tuple[Format, int], dict[str, Tensor], int]]:
    """For each run of columns of ``weight (N, K)``: ``((format, columns), params (N, G), first column)``.

    ``importance (K,)`` weighs the squared error of each column in the clip search; None covers the full range.
    """
    assert not layout.permuted, "columns are sorted before groups are fitted: with_sorted_columns"
    rows, start = weight.shape[0], 0
    for fmt, columns in layout.runs:
        groups = fmt.groups(columns)
        run = weight[:, start : start + columns].reshape(rows, groups, -1)
        run_importance = None if importance is None else importance[start : start + columns].reshape(groups, -1)
        step = max(1, _CHUNK_WEIGHTS // columns)
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            chunks = [run[i : i + step] for i in range(0, rows, step)]
            parts = list(pool.map(fmt.fit, chunks, [run_importance] * len(chunks)))
        yield (fmt, columns), {k: torch.cat([p[k] for p in parts]) for k in parts[0]}, start
        start += columns


def with_sorted_columns(
    quantizer: Quantizer, weight: Tensor, stats: LayerStats | None, layout: Layout, seed: int
) -> tuple[QuantizedTensor, dict[str, float]]:
    """Quantize with a permuted layout: what sorts the columns of the weight sorts those of its statistics too.

    Raises:
        FewbitsError: no statistics to sort by.
    """
    if stats is None or stats.n_tokens == 0:
        raise FewbitsError("layout: got columns to sort (perm:) and no calibration tokens to sort them by; give more "
                           "text, keep the tensor, or plan it without perm:")
    order = stats.column_order()
    plain = dataclasses.replace(layout, permuted=False)
    made, facts = quantizer.quantize(weight[:, order], stats.permuted(order), plain, seed=seed)
    return dataclasses.replace(made, permutation=order), facts

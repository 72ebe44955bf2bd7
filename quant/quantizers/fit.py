"""Static group parameters: fitted once on the original weights, for every group of a layout."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from fewbits.quant.types import Format, Layout

# The clip search goes over its data about a hundred times: a chunk of this many weights stays in a core's cache, and
# is too small for torch to split over threads, so that chunks can be spread over threads instead.
_CHUNK_WEIGHTS = 1 << 15


def fit_layout(
    weight: Tensor, importance: Tensor | None, layout: Layout
) -> Iterator[tuple[tuple[Format, int], dict[str, Tensor], int]]:
    """For each run of columns of ``weight (N, K)``: ``((format, columns), params (N, G), first column)``.

    ``importance (K,)`` weighs the squared error of each column in the clip search; None covers the full range.
    """
    rows, start = weight.shape[0], 0
    for fmt, columns in layout:
        groups = fmt.groups(columns)
        run = weight[:, start : start + columns].reshape(rows, groups, -1)
        run_importance = None if importance is None else importance[start : start + columns].reshape(groups, -1)
        step = max(1, _CHUNK_WEIGHTS // columns)
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            chunks = [run[i : i + step] for i in range(0, rows, step)]
            parts = list(pool.map(fmt.fit, chunks, [run_importance] * len(chunks)))
        yield (fmt, columns), {k: torch.cat([p[k] for p in parts]) for k in parts[0]}, start
        start += columns

"""Means with an honest error: neighbouring tokens are not independent, so the error comes from groups of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIN_GROUPS = 8
_BLOCKS = (256, 64, 16, 4, 1)


@dataclass(frozen=True)
class Estimate:
    """A mean over tokens.

    Attributes:
        mean: over all values.
        stderr: standard error of the mean; None for a single value.
        count: values.
        method: how the error was estimated, in words.
    """

    mean: float
    stderr: float | None
    count: int
    method: str


def mean_of_windows(windows: Sequence[np.ndarray]) -> Estimate:
    """Mean of all values of all windows; each entry is a window's values in order, ``(n_i,)``.

    The error is that of a ratio estimator (Cochran, Sampling Techniques, 3rd ed., eq. 6.13) over windows, as sums and
    counts; with fewer than 8 windows over blocks of 256 tokens inside them, or 64, 16, 4, the largest that gives 8
    groups. Blocks of one window share its topic, so the smaller they are the more they understate; ``method`` tells.
    """
    assert windows and all(len(w) for w in windows)
    groups, method = list(windows), f"{len(windows)} windows"
    for block in _BLOCKS:
        if len(groups) >= MIN_GROUPS:
            break
        groups = [w[i:i + block] for w in windows for i in range(0, len(w), block)]
        method = f"{len(groups)} blocks of {block} tokens"
    sums = np.array([g.sum(dtype=np.float64) for g in groups])
    counts = np.array([len(g) for g in groups], dtype=np.float64)
    mean = sums.sum() / counts.sum()
    stderr = None
    if len(groups) > 1:
        spread = ((sums - mean * counts) ** 2).sum() * len(groups) / (len(groups) - 1)
        stderr = math.sqrt(spread) / counts.sum()
    return Estimate(float(mean), stderr, int(counts.sum()), f"ratio estimator over {method}")

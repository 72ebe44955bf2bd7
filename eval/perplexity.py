"""Perplexity, by the protocol that the field's tables use, with its standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from fewbits.eval.estimate import mean_of_windows
from fewbits.eval.scoring import score_windows
from fewbits.eval.text import choose_window, cut_windows


@dataclass(frozen=True)
class Perplexity:
    """``exp`` of the mean negative log-likelihood per scored token.

    Attributes:
        value: the perplexity.
        stderr: its standard error (delta method: perplexity times the error of the mean); None for a single token.
        nll: mean negative log-likelihood, nats per token.
        tokens: tokens scored.
        method: how the error was estimated, in words.
    """

    value: float
    stderr: float | None
    nll: float
    tokens: int
    method: str


def perplexity_of(nll_windows: Sequence[np.ndarray]) -> Perplexity:
    """Perplexity from the negative log-likelihoods of each window, in nats."""
    mean = mean_of_windows(nll_windows)
    value = math.exp(min(mean.mean, 700.0))  # e^710 overflows; a model that bad needs no more digits
    stderr = None if mean.stderr is None else value * mean.stderr
    return Perplexity(value, stderr, mean.mean, mean.count, f"delta method, {mean.method}")


def perplexity(
    model: Any, tokens: Tensor, *, window: int | None = None, stride: int | None = None, bos: int | None = None,
    limit: int | None = None,
) -> Perplexity:
    """Perplexity of a transformers ``model`` on ``tokens (L,)``; the windows are those of :func:`cut_windows`.

    Raises FewbitsError for a window or stride that does not fit, ModelError for outputs that are not finite.
    """
    windows = cut_windows(tokens, window=choose_window(model, window), stride=stride, bos=bos, limit=limit)
    return perplexity_of([s.nll for s in score_windows(model, windows)])

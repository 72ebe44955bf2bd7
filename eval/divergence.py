"""How far a model's next-token distributions are from its baseline's."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewbits.eval.estimate import mean_of_windows
from fewbits.eval.scoring import Progress, WindowScores, score_windows, silent
from fewbits.eval.text import Window
from fewbits.quant.errors import FewbitsError


@dataclass(frozen=True)
class Divergence:
    """Means over every position of the windows compared, the last one included.

    Attributes:
        kl_mean: KL(baseline || model), nats per token.
        kl_stderr: its standard error; None for a single position.
        top1_agreement: share of positions at which both models rank the same token first.
        top1_stderr: its standard error.
        nll_increase: mean negative log-likelihood, model less baseline, nats per token, over the same scored tokens.
        nll_increase_stderr: its standard error; paired, so much smaller than that of either perplexity.
        positions: positions compared.
        method: how the error of the KL was estimated, in words.
    """

    kl_mean: float
    kl_stderr: float | None
    top1_agreement: float
    top1_stderr: float | None
    nll_increase: float
    nll_increase_stderr: float | None
    positions: int
    method: str


def divergence_of(scores: Sequence[WindowScores]) -> Divergence:
    """Divergence from the windows that were compared; those without a KL are passed over for it."""
    kl = mean_of_windows([s.kl for s in scores if s.kl is not None])
    agree = mean_of_windows([s.agree for s in scores if s.agree is not None])
    increase = mean_of_windows([s.nll - s.baseline_nll for s in scores if s.baseline_nll is not None])
    return Divergence(kl.mean, kl.stderr, agree.mean, agree.stderr, increase.mean, increase.stderr, kl.count, kl.method)


def divergence(
    model: Any, baseline: Any, rows: Iterable[Tensor], *, kl_windows: int | None = None, progress: Progress = silent
) -> Divergence:
    """KL(baseline || model) of two transformers models on ``rows`` of token ids, run in lock-step, row by row.

    Each row ``(T,)`` is a window of its own, e.g. the rows of a calibration set, or :func:`cut_windows` of a text by
    their ``ids``. Raises ModelError for outputs that are not finite or vocabularies that differ, FewbitsError when
    there are no rows or one has fewer than 2 tokens.
    """
    windows = [Window(ids=row, first_target=1, first_position=0) for row in rows]
    if not windows or any(len(w.ids) < 2 for w in windows):
        raise FewbitsError(f"divergence: got {len(windows)} rows of tokens, needed at least one, of 2 tokens or more")
    return divergence_of(score_windows(model, windows, baseline=baseline, kl_windows=kl_windows, progress=progress))

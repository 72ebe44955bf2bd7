"""One pass over the windows: every model runs once per window, and all measures come from that run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewbits.eval.logits import Rows, chunk_rows, token_kl, token_nll, window_logits
from fewbits.eval.text import Window
from fewbits.quant.errors import ModelError

Progress = Callable[[str, int, int], None]
"""``progress(what, done, total)``: called when a unit of work is finished."""


def silent(what: str, done: int, total: int) -> None:
    """A :data:`Progress` that shows nothing."""


@dataclass(frozen=True)
class WindowScores:
    """What one window gave; every array is float64.

    Attributes:
        nll: ``(targets,)`` negative log-likelihood of each scored token, nats.
        baseline_nll: the same of the baseline, when there is one.
        kl: ``(positions,)`` KL(baseline || model) at each position, nats.
        agree: ``(positions,)`` 1 where both models rank the same token first, else 0.
    """

    nll: np.ndarray
    baseline_nll: np.ndarray | None = None
    kl: np.ndarray | None = None
    agree: np.ndarray | None = None


def score_windows(
    model: Any, windows: Sequence[Window], *, baseline: Any = None, kl_windows: int | None = None,
    progress: Progress = silent,
) -> list[WindowScores]:
    """Score every window. With ``kl_windows`` the divergence is taken on the first so many of them only.

    Raises ModelError when a model's outputs are not finite, or the two have different vocabularies.
    """
    scores = []
    for i, window in enumerate(windows):
        compare = baseline is not None and (kl_windows is None or i < kl_windows)
        result = _score(model, window, baseline, compare)
        for name, values in (("the model", result.nll), ("the baseline", result.baseline_nll), ("KL", result.kl)):
            if values is not None and not np.isfinite(values).all():
                raise ModelError(f"{name}: {np.count_nonzero(~np.isfinite(values))} of {len(values)} values in window "
                                 f"{i} are not finite; if it computes in float16, try --dtype float32")
        scores.append(result)
        progress("Evaluating", i + 1, len(windows))
    return scores


@torch.inference_mode()
def _score(model: Any, window: Window, baseline: Any, compare: bool) -> WindowScores:
    rows = window_logits(model, window.ids)
    base_rows = window_logits(baseline, window.ids) if baseline is not None else None
    last = len(window.ids) - 1
    first_row = window.first_target - 1  # row t predicts token t + 1; the last row predicts nothing that we know
    start = min(first_row, window.first_position) if compare else first_row
    stop = last + 1 if compare else last
    parts: dict[str, list[Tensor]] = {"nll": [], "baseline_nll": [], "kl": [], "agree": []}
    step = chunk_rows(rows(start, start + 1).shape[1])
    for a in range(start, stop, step):
        b = min(a + step, stop)
        log_probs = rows(a, b).log_softmax(1)
        # targets exist for rows first_row .. last - 1, a part of this chunk
        c, d = max(a, first_row), min(b, last)
        if c < d:
            parts["nll"].append(token_nll(log_probs[c - a:d - a], window.ids[c + 1:d + 1]))
        if base_rows is None:
            continue
        base = _baseline_rows(base_rows, a, b, log_probs)
        if c < d:
            parts["baseline_nll"].append(token_nll(base[c - a:d - a], window.ids[c + 1:d + 1]))
        if compare and (e := max(a, window.first_position)) < b:
            parts["kl"].append(token_kl(base[e - a:], log_probs[e - a:]))
            parts["agree"].append((base[e - a:].argmax(1) == log_probs[e - a:].argmax(1)).double())
    return WindowScores(**{k: torch.cat(v).cpu().numpy() for k, v in parts.items() if v})


def _baseline_rows(base_rows: Rows, start: int, stop: int, log_probs: Tensor) -> Tensor:
    base = base_rows(start, stop)
    if base.shape != log_probs.shape:
        raise ModelError(f"the baseline has {base.shape[1]} logits and the model {log_probs.shape[1]}; their "
                         "vocabularies differ: compare a model with the one it was made from")
    return base.to(log_probs.device).log_softmax(1)

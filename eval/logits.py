"""Logits of one window a few rows at a time, and what is computed from each row.

A window of 2048 tokens over a vocabulary of 150,000 is 1.2 GB of float32 logits, and a comparison needs several such
arrays. So the body of the model runs once, and its output head on some rows at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**23  # 32 MB of float32 per array; larger chunks were no faster on CPU

Rows = Callable[[int, int], Tensor]
"""``rows(start, stop)`` -> float32 logits ``(stop - start, V)``."""


@torch.inference_mode()
def window_logits(model: Any, ids: Tensor) -> Rows:
    """Run ``model`` on ``ids (T,)``; the logits come from the returned function, as many rows at a time as asked for.

    The head is applied by rows only when that gives the same last row as the model's own ``forward``: some models
    scale or cap their logits after the head. For those all logits are made at once.
    """
    batch = ids.unsqueeze(0).to(model.device)
    head = model.get_output_embeddings()
    if head is not None and "logits_to_keep" in inspect.signature(model.forward).parameters:
        hidden: list[Tensor] = []
        hook = model.base_model.register_forward_hook(lambda _m, _a, out: hidden.append(out[0]))
        try:
            last = model(batch, use_cache=False, logits_to_keep=1).logits[0]
        finally:
            hook.remove()
        if len(hidden) == 1 and _applies(head, hidden[0], last):
            return lambda start, stop: head(hidden[0][0, start:stop]).float()
        del hidden
    logits = model(batch, use_cache=False).logits[0]
    return lambda start, stop: logits[start:stop].float()


def _applies(head: Any, hidden: Tensor, last: Tensor) -> bool:
    """Whether ``head`` alone makes the model's last row of logits ``(1, V)`` from ``hidden (1, T, C)``."""
    if hidden.ndim != 3 or hidden.shape[-1] != getattr(head, "in_features", hidden.shape[-1]):
        return False
    own = head(hidden[0, -1:])
    return own.shape == last.shape and torch.allclose(own.float(), last.to(own.device).float(), rtol=1e-5, atol=1e-5)


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits to handle at a time."""
    return max(1, CHUNK_ELEMENTS // vocabulary)


def token_nll(log_probs: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, float64 ``(R,)``, of ``targets (R,)`` under ``log_probs (R, V)``."""
    return -log_probs.gather(1, targets.to(log_probs.device).unsqueeze(1)).squeeze(1).double()


def token_kl(baseline: Tensor, other: Tensor) -> Tensor:
    """KL(baseline || other) in nats, float64 ``(R,)``, of log-probabilities ``(R, V)``.

    Summed as ``p log(p / q) - p + q``. The extra terms add up to zero, but with them no term is negative, and a
    rounding error of a row's normaliser cancels to second order instead of adding to the result. Equal models give
    exactly 0; what float32 leaves is below 1e-7 nats a row.
    """
    p = baseline.exp()
    terms = torch.where(p > 0, p * (baseline - other), 0.0)  # 0 * (-inf + inf) is 0 here, where a vocabulary is masked
    return (terms - p + other.exp()).sum(1, dtype=torch.float64)

"""Warnings about calibration data: what silently costs quality, said before hours are spent on it.

Each function returns sentences for the user (name, got, needed, way out); an empty list means that all is well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

TOKENS_PER_COLUMN = 4  # below this many tokens a column, the Hessian of a matrix is mostly noise and damping
STARVED_SHARE = 0.005  # an expert that sees less than this share of the tokens
_NAMED = 8  # names listed before "and n more"


def prepended_bos(tokenizer: Any) -> int | None:
    """The BOS id when the tokenizer itself puts one before ``tokenizer("text")``, else None."""
    bos = tokenizer.bos_token_id
    ids = tokenizer("text")["input_ids"]
    return bos if bos is not None and ids and ids[0] == bos else None


def lint_tokenizer(tokenizer: Any, *, has_chat: bool, chat_has_bos: bool) -> list[str]:
    """Where BOS and the chat template disagree with how the model will be used.

    ``has_chat``: some of the text went through the chat template; ``chat_has_bos``: it wrote a BOS of its own.
    """
    out = []
    bos = prepended_bos(tokenizer)
    if bos is None and getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token_id is not None:
        out.append("missing BOS: the tokenizer says add_bos_token, but does not put one before text; the rows have "
                   "none either. If the model was trained with it, repair tokenizer.json (post_processor)")
    if bos is not None and has_chat and chat_has_bos:
        out.append("double BOS: the chat template writes one and the tokenizer adds another; the rows keep one. "
                   "Where you serve the model, tokenize rendered chats with add_special_tokens=False")
    if tokenizer.chat_template and not has_chat:
        out.append("the model has a chat template, but all calibration text is plain; its behaviour in chats may "
                   "suffer. Add conversations as JSONL with messages, or 'self'")
    return out


def lint_rows(tokens: Tensor) -> list[str]:
    """Rows of ``tokens (S, L)`` that appear more than once."""
    doubles = tokens.shape[0] - torch.unique(tokens, dim=0).shape[0]
    if not doubles:
        return []
    return [f"{doubles} of {tokens.shape[0]} calibration rows are duplicates of another and add nothing; "
            "remove repeated text, or the source that is named twice"]


def lint_tokens(n_tokens: int, widths: Mapping[str, int]) -> list[str]:
    """Warn when fewer than 4 tokens per column reach a matrix; ``widths``: matrix name -> K (in_features)."""
    short = {name: k for name, k in widths.items() if n_tokens < TOKENS_PER_COLUMN * k}
    if not short:
        return []
    name, k = max(short.items(), key=lambda item: item[1])
    return [f"{len(short)} of {len(widths)} matrices see fewer than {TOKENS_PER_COLUMN} tokens per column; the worst "
            f"is {name}: K = {k} needs {TOKENS_PER_COLUMN * k} tokens, got {n_tokens}; raise --samples"]


def lint_experts(counts: Mapping[str, int], total_tokens: int, *, widths: Mapping[str, int] | None = None) -> list[str]:
    """Name the experts that saw less than 0.5 % of ``total_tokens``, or fewer tokens than their K.

    ``counts``: expert name -> tokens routed to it; ``widths``: expert name -> K, where known.
    """
    widths = widths or {}
    starved = [name for name, n in counts.items() if n < STARVED_SHARE * total_tokens or n < widths.get(name, 0)]
    if not starved:
        return []
    starved.sort(key=lambda name: (counts[name], name))
    named = ", ".join(f"{name} ({counts[name]})" for name in starved[:_NAMED])
    more = f" and {len(starved) - _NAMED} more" if len(starved) > _NAMED else ""
    return [f"{len(starved)} of {len(counts)} experts are starved: {named}{more} saw too few of {total_tokens} tokens "
            "to be calibrated; raise --samples, or add text of other kinds"]

"""Text to evaluate on: read as it is, tokenized whole once, cut into windows."""

from __future__ import annotations

import hashlib
import platform
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.quant.errors import FewbitsError

MAX_DEFAULT_WINDOW = 2048


@dataclass(frozen=True)
class Text:
    """A named text; ``name`` is what reports call it."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content.encode()).hexdigest()


@dataclass(frozen=True)
class Window:
    """A run of tokens that the model sees at once.

    Attributes:
        ids: ``(T,)`` int64, a BOS token first where one was asked for.
        first_target: the first index of ``ids`` whose prediction is scored, at least 1: nothing predicts index 0.
        first_position: the first index whose next-token distribution is compared; 0 unless an earlier window
            already covered the start of this one.
    """

    ids: Tensor
    first_target: int
    first_position: int


def read_text(path: str | Path) -> Text:
    """Read a UTF-8 file, bytes unchanged. Raises FewbitsError when it is missing, empty or not UTF-8."""
    path = Path(path).expanduser()
    if path.is_dir():
        raise FewbitsError(f"--text {path}: is a directory; pass the text files in it")
    if not path.is_file():
        raise FewbitsError(f"--text {path}: no such file; check the path")
    try:
        content = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as e:
        raise FewbitsError(f"--text {path}: byte {e.start} is not UTF-8; convert it: iconv -t UTF-8") from e
    if not content.strip():
        raise FewbitsError(f"--text {path}: is empty; pass a file with text in it")
    return Text(str(path), content)


def is_held_out(topic: str) -> bool:
    """Whether a topic of ``pydoc_data.topics`` belongs to the evaluation: every fourth or so, by its name's CRC-32."""
    return zlib.crc32(topic.encode()) % 4 == 1


def default_text() -> Text:
    """English technical prose that every Python carries: a held-out part of CPython's language reference.

    For a first look where there is no network. The wording changes with the version of Python, so numbers compare
    only within one (the name says which), and the text was surely seen in the training of every model.
    """
    from pydoc_data.topics import topics

    content = "\n\n".join(topics[name] for name in sorted(topics) if is_held_out(name))
    return Text(f"pydoc_data.topics (held-out part, CPython {platform.python_version()})", content)


def tokenize(text: Text, tokenizer: Any) -> Tensor:
    """Tokens ``(L,)`` of the whole text, without BOS or any other special token."""
    # verbose=False: a text longer than the context is meant to be, and the tokenizer would warn of it
    ids = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.long)


def context_length(model: Any) -> int | None:
    """The most positions the model's config allows, or None when it does not say."""
    config = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def choose_window(model: Any, window: int | None) -> int:
    """``window`` checked against the model's context, or the smaller of 2048 and that context.

    Raises FewbitsError when it is below 2 or does not fit.
    """
    most = context_length(model)
    if window is None:
        return min(MAX_DEFAULT_WINDOW, most or MAX_DEFAULT_WINDOW)
    if window < 2:
        raise FewbitsError(f"--window {window}: a window needs at least 2 tokens, one to predict the next from")
    if most is not None and window > most:
        raise FewbitsError(f"--window {window}: the model's context is {most} tokens; choose at most {most}")
    return window


def cut_windows(
    tokens: Tensor, *, window: int, stride: int | None = None, bos: int | None = None, limit: int | None = None
) -> list[Window]:
    """Windows over ``tokens (L,)``; each token is scored once at most.

    Without ``stride`` they lie side by side, as the perplexities of the field are reported: the first token of each is
    context only. With a smaller stride they overlap, and each scores only its new tokens, with at least
    ``window - stride`` tokens of context. With ``bos`` each window starts with that token and holds one token of text
    less. What is left of a whole window at the end is dropped, unless the text is shorter than one window: then there
    is a single short one. ``limit``: at most so many windows.

    Raises FewbitsError when the text is too short to score a token, or the stride does not fit the window.
    """
    lead = 0 if bos is None else 1
    body = window - lead
    step = body if stride is None else stride
    if not 1 <= step <= body:
        raise FewbitsError(f"--stride {stride}: must lie between 1 and the {body} tokens of text in a window, or some "
                           "would be skipped")
    if len(tokens) + lead < 2:
        raise FewbitsError(f"the text has {len(tokens)} token(s); perplexity needs at least 2: pass a longer text")
    begins = list(range(0, len(tokens) - body + 1, step)) or [0]
    prefix = tokens.new_tensor([] if bos is None else [bos])
    windows = []
    covered = 0
    for begin in begins[:limit]:
        overlap = covered - begin
        windows.append(Window(
            ids=torch.cat([prefix, tokens[begin:begin + body]]),
            first_target=max(1, lead + overlap),
            first_position=lead + overlap if overlap else 0,
        ))
        covered = begin + body
    return windows

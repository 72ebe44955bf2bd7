"""Calibration tokens: rows of one length, packed from text, conversations, data sets or the model itself.

The rows depend on the texts, the tokenizer and the seed only, and the fingerprint says whether two runs saw the same.
Rows with images (:mod:`fewbits.calibration.images`) join them with :meth:`CalibrationSet.with_images`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fewbits.calibration.documents import Document, read_documents
from fewbits.calibration.images import ImageRows
from fewbits.calibration.lint import lint_rows, lint_tokenizer, prepended_bos
from fewbits.quant.errors import CalibrationError

Generate = Callable[[int, int, int], Tensor]
"""``generate(n_rows, length, seed) -> (n_rows, length)`` int64: text of the model's own."""

_BYTES_PER_TOKEN = 16  # several times what any language needs, so that the text read is enough for the rows asked
_POOL = 8  # random rows are drawn from this many times as much text
_MIN_BUDGET = 1_000_000
_SELF_BATCH = 32  # rows sampled at a time: a compromise between speed and the memory of the key-value cache
_PIECE = 2_000_000  # characters tokenized in one call: a tokenizer holds about 100 bytes per token while it works


@dataclass(frozen=True)
class CalibrationSet:
    """Tokens to calibrate with.

    Attributes:
        tokens: ``(S, L)`` int64.
        mask: ``(S, L)`` bool, False where a row is padded.
        fingerprint: sha256 hex over the bytes of tokens and mask, and over the images.
        sources: where the rows came from, as named by the user, with the rows drawn of each.
        warnings: sentences for the user.
        images: rows of an image and its text, beside those of ``tokens``; each as long as it comes.
        tuning: these rows of text and more, for refiners; None where there are none.
    """

    tokens: Tensor
    mask: Tensor
    fingerprint: str
    sources: list[str]
    warnings: list[str]
    images: ImageRows | None = None
    tuning: CalibrationSet | None = None

    @property
    def n_tokens(self) -> int:
        """Tokens that count, padding left out."""
        return int(self.mask.sum()) + sum(self.images.lengths if self.images else ())

    @property
    def n_rows(self) -> int:
        return len(self.tokens) + (len(self.images) if self.images else 0)

    def with_images(self, images: ImageRows, source: str) -> CalibrationSet:
        """These rows and some with images."""
        both = hashlib.sha256(f"{self.fingerprint} {images.fingerprint}".encode()).hexdigest()
        named = f"{source}: {len(images)} rows with images"
        return replace(self, fingerprint=both, sources=[*self.sources, named], images=images)

    def first(self, n: int) -> CalibrationSet:
        """The first ``n`` rows of text, those with images as they are."""
        tokens, mask = self.tokens[:n], self.mask[:n]
        return replace(self, tokens=tokens, mask=mask, fingerprint=fingerprint(tokens, mask))

    def hold_out(self, n: int) -> tuple[CalibrationSet, list[Tensor]]:
        """Some rows less, evenly spaced, and those rows ``(tokens,)``; for a text that has no others to judge by."""
        spaced = ((torch.arange(n) + 0.5) * len(self.tokens) / n).long()
        held = [self.tokens[i][self.mask[i]] for i in spaced]
        left = torch.ones(len(self.tokens), dtype=torch.bool)
        left[spaced] = False
        tokens, mask = self.tokens[left], self.mask[left]
        warning = f"{n} of the {len(self.tokens)} rows are held out to judge by, so {len(tokens)} are calibrated on"
        return replace(self, tokens=tokens, mask=mask, fingerprint=fingerprint(tokens, mask),
                       warnings=[*self.warnings, warning]), held


@dataclass
class _Pool:
    """All rows of one source: ``tokens (R, L)``, ``mask (R, L)``."""

    name: str
    tokens: Tensor
    mask: Tensor
    warnings: list[str] = field(default_factory=list)
    has_chat: bool = False
    chat_has_bos: bool = False


@dataclass(frozen=True)
class _Packing:
    """How a source becomes rows: what :func:`load_calibration` was asked for, and the BOS that a row begins with."""

    samples: int
    seqlen: int
    seed: int
    spread: bool
    bos: int | None

    @property
    def text_tokens(self) -> int:
        """Tokens of text in a row."""
        return self.seqlen - (self.bos is not None)


def load_calibration(
    sources: Sequence[str], tokenizer: Any, *, samples: int = 128, seqlen: int = 512, seed: int = 0,
    order: str = "random", generate: Generate | None = None,
) -> CalibrationSet:
    """Rows of ``seqlen`` tokens from ``sources`` (see :mod:`fewbits.calibration.documents`; also ``self``).

    The documents of a source are tokenized without special tokens, joined with EOS between them, and cut into
    contiguous rows. When the tokenizer itself begins text with BOS, every row begins with one BOS and carries
    ``seqlen - 1`` tokens of text. What is left at the end of a source and fills no row is lost, unless the source fills
    no row at all: then it makes one padded row.

    ``samples`` are divided evenly over the sources; one that has fewer rows leaves its share to the others.
    ``order="first"`` takes the first rows of each source, ``"random"`` draws them without replacement, seeded.
    Work is bounded: of a large source, "first" reads what it needs, "random" about 8 times that, from 16 evenly spaced
    slices of a file or the beginning of a data set. ``self`` calls ``generate(n_rows, seqlen, seed)``.

    Raises CalibrationError when a source cannot be read or used, or nothing usable is left.
    """
    sources = [sources] if isinstance(sources, str) else list(sources)
    _check_arguments(sources, samples, seqlen, order)
    packing = _Packing(samples, seqlen, seed, order == "random", prepended_bos(tokenizer))
    pools = {i: _pool(s, tokenizer, packing) for i, s in enumerate(sources) if s != "self"}
    quotas = _quotas([len(pools[i].tokens) if i in pools else samples for i in range(len(sources))], samples)
    tokens, masks, names = [], [], []
    for i, n in enumerate(quotas):
        pool = pools[i] if i in pools else _generated(generate, n, packing)
        chosen = _choose(len(pool.tokens), n, seed + i if packing.spread else None)
        tokens.append(pool.tokens[chosen])
        masks.append(pool.mask[chosen])
        names.append(f"{pool.name}: {n} rows")
    warnings = [w for pool in pools.values() for w in pool.warnings]
    if not sum(quotas):
        details = "; ".join(warnings) or "the sources are empty"
        raise CalibrationError(f"calibration: no usable tokens ({details}); name a source with text")
    if sum(quotas) < samples:
        warnings.append(f"{sum(quotas)} calibration rows of {seqlen} tokens, {samples} asked; "
                        "add text, or lower --samples or --seqlen")
    has_chat = "self" in sources or any(p.has_chat for p in pools.values())
    warnings += lint_tokenizer(tokenizer, has_chat=has_chat, chat_has_bos=any(p.chat_has_bos for p in pools.values()))
    rows, mask = torch.cat(tokens), torch.cat(masks)
    return CalibrationSet(rows, mask, fingerprint(rows, mask), names, warnings + lint_rows(rows))


def fingerprint(tokens: Tensor, mask: Tensor) -> str:
    """sha256 hex over the bytes of ``tokens`` (int64, little-endian) and ``mask`` (one byte each)."""
    digest = hashlib.sha256(tokens.contiguous().numpy().astype("<i8").tobytes())
    digest.update(mask.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_arguments(sources: list[str], samples: int, seqlen: int, order: str) -> None:
    if not sources:
        raise CalibrationError("calibration: no sources; name a text or JSONL file, 'self' or 'default'")
    if samples < 1:
        raise CalibrationError(f"samples: got {samples}, needs at least 1")
    if seqlen < 2:
        raise CalibrationError(f"seqlen: got {seqlen}, needs at least 2")
    if order not in ("random", "first"):
        raise CalibrationError(f"order: got {order!r}, needs 'random' or 'first'")


def _pool(source: str, tokenizer: Any, packing: _Packing) -> _Pool:
    """Every row that a source gives within the budget of reading."""
    budget = max(_MIN_BUDGET, _BYTES_PER_TOKEN * packing.samples * packing.seqlen * (_POOL if packing.spread else 1))
    for _ in range(3):
        documents = read_documents(source, budget, spread=packing.spread, seed=packing.seed)
        pool = _Pool(documents.name, torch.empty(0), torch.empty(0), list(documents.warnings))
        enough = None if packing.spread else packing.samples * packing.text_tokens
        stream = _tokenize(documents.items, tokenizer, pool=pool, bos=packing.bos, enough=enough)
        pool.tokens, pool.mask = pack(stream, packing.seqlen, bos=packing.bos, pad=_pad_token(tokenizer))
        if len(pool.tokens) >= packing.samples or not documents.more:
            break
        budget *= 4  # long tokens, or much was dropped, and the source has more; but never all of a huge one
    return pool


def _tokenize(items: list[Document], tokenizer: Any, *, pool: _Pool, bos: int | None, enough: int | None) -> Tensor:
    """All tokens ``(T,)`` of some documents, EOS between them; stops when there are ``enough``. Notes in ``pool``."""
    eos = tokenizer.eos_token_id
    parts: list[Tensor] = []
    total, failed = 0, []
    for document in items:
        if enough is not None and total >= enough:
            break
        try:
            text = document.text if document.messages is None else _render(document.messages, tokenizer, pool.name)
        except ValueError as e:
            if isinstance(e, CalibrationError):
                raise
            failed.append(str(e))
            continue
        ids = _encode(text, tokenizer)
        if document.messages is not None:
            pool.has_chat = True
            if bos is not None and len(ids) and ids[0] == bos:
                pool.chat_has_bos = True
                ids = ids[1:]  # the row brings its own
        # a chat template ends with EOS itself, or with EOS and a line end
        if parts and eos is not None and eos not in parts[-1][-3:]:
            parts.append(torch.tensor([eos]))
        parts.append(ids)
        total += len(ids)
    if failed:
        pool.warnings.append(f"{pool.name}: the chat template refused {len(failed)} of {len(items)} conversations; "
                             f"the first with: {failed[0]}")
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _encode(text: str, tokenizer: Any) -> Tensor:
    """Token ids ``(T,)`` without special tokens; long texts in pieces that end with a line, to bound the memory."""
    pieces: list[Tensor] = []
    start = 0
    while start < len(text):
        end = start + _PIECE
        if end < len(text):
            line_end = text.rfind("\n", start, end)
            end = line_end + 1 if line_end >= 0 else end
        ids = tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        pieces.append(torch.tensor(ids, dtype=torch.int64))
        start = end
    return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


def _render(messages: list[dict[str, Any]], tokenizer: Any, name: str) -> str:
    """A conversation in the tokenizer's own template. Raises ValueError when the template refuses it."""
    if not tokenizer.chat_template:
        raise CalibrationError(f"{name}: has conversations, but the tokenizer has no chat template; use the instruct "
                               "model's tokenizer, or rows with text")
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, KeyError) as e:
        raise ValueError(f"{type(e).__name__}: {str(e)[:200]}") from e


def _pad_token(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0


def pack(stream: Tensor, seqlen: int, *, bos: int | None, pad: int) -> tuple[Tensor, Tensor]:
    """Cut ``stream (T,)`` into rows: tokens and mask, both ``(R, seqlen)``.

    Row i is ``[bos]`` (if any) and the i-th contiguous slice; the tail that fills no row is lost. A stream shorter than
    one row makes one padded row, an empty one none.
    """
    width = seqlen - (bos is not None)
    count = len(stream) // width
    if count == 0 and len(stream):
        body, mask = torch.full((1, width), pad), torch.zeros(1, width, dtype=torch.bool)
        body[0, :len(stream)] = stream
        mask[0, :len(stream)] = True
    else:
        body = stream[:count * width].view(count, width)
        mask = torch.ones(count, width, dtype=torch.bool)
    if bos is not None:
        body = torch.cat([torch.full((len(body), 1), bos), body], dim=1)
        mask = torch.cat([torch.ones(len(mask), 1, dtype=torch.bool), mask], dim=1)
    return body, mask


def _quotas(available: list[int], samples: int) -> list[int]:
    """Rows to take of each source: even shares, where a source that has fewer leaves the rest to the others."""
    quotas = [0] * len(available)
    left = min(samples, sum(available))
    while left:
        open_ = [i for i, n in enumerate(available) if quotas[i] < n]
        for i in open_[:left]:
            n = min(max(left // len(open_), 1), available[i] - quotas[i])
            quotas[i] += n
        left = min(samples, sum(available)) - sum(quotas)
    return quotas


def _choose(rows: int, n: int, seed: int | None) -> Tensor:
    """Indices of ``n`` of ``rows``: the first, or drawn without replacement."""
    if seed is None:
        return torch.arange(n)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:n]


def _generated(generate: Generate | None, rows: int, packing: _Packing) -> _Pool:
    if generate is None:
        raise CalibrationError("self: the model cannot generate here; name a text or JSONL file instead")
    shape = (rows, packing.seqlen)
    tokens = generate(*shape, packing.seed) if rows else torch.empty(shape, dtype=torch.int64)
    assert tokens.shape == shape and tokens.dtype == torch.int64, f"generate gave {tuple(tokens.shape)}, needs {shape}"
    return _Pool("self", tokens, torch.ones(shape, dtype=torch.bool), has_chat=True)


@torch.no_grad()
def self_generate(
    model: torch.nn.Module, tokenizer: Any, rows: int, length: int, *, seed: int, temperature: float = 1.0,
) -> Tensor:
    """Sample ``(rows, length)`` int64 tokens from a model, 32 rows at a time.

    A row of a chat model begins as its template begins a user's turn, and the model writes both sides (the way of
    Magpie, arXiv 2406.08464). Otherwise it begins with BOS, or with a random ordinary token where the tokenizer has
    none (LLM-QAT, arXiv 2305.17888). Rows run through EOS: models are trained on packed text and begin anew there.

    Raises CalibrationError when the logits are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    vocabulary = len(tokenizer)
    prefix = torch.tensor(_self_prefix(tokenizer)[:length], dtype=torch.int64)
    ordinary = torch.tensor(sorted(set(range(vocabulary)) - set(tokenizer.all_special_ids)))
    out = torch.empty(rows, length, dtype=torch.int64)
    for begin in range(0, rows, _SELF_BATCH):
        batch = out[begin:begin + _SELF_BATCH]
        if len(prefix):
            batch[:, :len(prefix)] = prefix
        else:
            batch[:, 0] = ordinary[torch.randint(len(ordinary), (len(batch),), generator=generator)]
        cache, seen = None, 0
        for t in range(max(len(prefix), 1), length):
            step = model(input_ids=batch[:, seen:t].to(device), past_key_values=cache, use_cache=True)
            cache, seen = step.past_key_values, t
            logits = step.logits[:, -1, :vocabulary].float().cpu() / temperature
            if not torch.isfinite(logits).all():
                raise CalibrationError("self: the model's logits are NaN or Inf; load it in float32 or bfloat16, "
                                       "or name a text file")
            batch[:, t] = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    return out


def _self_prefix(tokenizer: Any) -> list[int]:
    """Tokens that every sampled row begins with; none where it is to be a random token."""
    bos, mark = tokenizer.bos_token_id, "CONTENT"
    if tokenizer.chat_template:
        try:
            head, found, _ = _render([{"role": "user", "content": mark}], tokenizer, "self").partition(mark)
        except ValueError:  # a template that wants more than one user's turn: begin as a plain model does
            head, found = "", ""
        ids = _encode(head, tokenizer).tolist() if found else []
        if ids:
            begins = bos is None or ids[0] == bos or prepended_bos(tokenizer) is None
            return ids if begins else [bos, *ids]
    return [] if bos is None else [bos]

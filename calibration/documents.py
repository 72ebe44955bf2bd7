"""Reads the texts that a calibration source names, without reading more than is needed.

A source is one string:

    notes.txt                           any text file (UTF-8): one document
    chats.jsonl, chats.json             rows (a line each, or a JSON list) with ``messages``, ``conversations`` (as
                                        ShareGPT) or ``text``: one document a row
    hf:NAME[:CONFIG[:SPLIT]][#COLUMN]   a dataset through the ``datasets`` package, streamed; CONFIG may be empty,
                                        SPLIT is train, COLUMN is the first of messages, conversations, text
    default                             the language reference that CPython carries: English technical prose, offline
"""

from __future__ import annotations

import codecs
import json
import platform
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbits.quant.errors import CalibrationError

SLICES = 16  # evenly spaced places at which a file is read that is larger than the budget
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}
_HF_SYNTAX = "hf:NAME[:CONFIG[:SPLIT]][#COLUMN]"


@dataclass(frozen=True)
class Document:
    """One text, or one conversation as ``[{"role": ..., "content": ...}, ...]``."""

    text: str = ""
    messages: list[dict[str, Any]] | None = None

    @property
    def size(self) -> int:
        """Characters, roughly."""
        return len(self.text) + sum(len(m["content"]) for m in self.messages or [])


@dataclass
class Documents:
    """What was read of one source.

    Attributes:
        name: the source, for messages.
        items: its documents, in order.
        warnings: what was left out, and why.
        more: the source has more text than was read.
    """

    name: str
    items: list[Document] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    more: bool = False


def read_documents(source: str, budget: int, *, spread: bool, seed: int = 0) -> Documents:
    """Up to about ``budget`` bytes of a source: its beginning, or with ``spread`` evenly spaced slices of a file.

    Raises CalibrationError when the source does not exist or is not text.
    """
    if source == "default":
        return Documents(f"default ({platform.python_implementation()} {platform.python_version()} reference)",
                         default_documents())
    if source.startswith("hf:"):
        return _read_dataset(source, budget, seed=seed if spread else None)
    path = Path(source).expanduser()
    if path.is_dir():
        raise CalibrationError(f"{source}: is a directory; name its text or JSONL files one by one")
    if not path.is_file():
        raise CalibrationError(f"{source}: no such file; needs a text or JSONL file, {_HF_SYNTAX}, 'self' or 'default'")
    if path.suffix.lower() not in (".jsonl", ".json"):
        slices, more = _read_slices(path, budget, spread=spread)
        return Documents(source, [Document(text=s) for s in slices if s.strip()], _notice(path, slices, more), more)
    if path.suffix.lower() == ".json" and (rows := _json_list(path, budget)) is not None:
        return _rows_to_documents(source, enumerate(rows, 1))
    slices, more = _read_slices(path, budget, spread=spread)
    lines = [line for s in slices for line in s.split("\n")]  # not splitlines: JSON strings may hold U+2028
    out = _rows_to_documents(source, ((i, line) for i, line in enumerate(lines, 1) if line.strip()))
    return Documents(source, out.items, _notice(path, slices, more) + out.warnings, more)


def _notice(path: Path, slices: list[str], more: bool) -> list[str]:
    if not more or len(slices) < 2:
        return []
    read = sum(len(s) for s in slices)
    return [f"{path.name}: {path.stat().st_size / 1e6:.0f} MB; rows are drawn from {len(slices)} evenly spaced slices "
            f"of it, {read / 1e6:.1f} MB in all"]


def _read_slices(path: Path, budget: int, *, spread: bool) -> tuple[list[str], bool]:
    """Texts of at most ``budget`` bytes in all, cut at line ends, and whether the file has more."""
    size = path.stat().st_size
    try:
        with open(path, "rb") as f:
            if size <= budget:
                return [_decode(f.read(), path, cut=False)], False
            count = SLICES if spread else 1
            out = []
            for i in range(count):
                f.seek(i * size // count)
                raw = f.read(budget // count)
                if i:  # up to the first line end lies the rest of a line that began earlier
                    raw = raw[raw.find(b"\n") + 1:].lstrip(bytes(range(0x80, 0xC0)))
                end = raw.rfind(b"\n") if f.tell() < size else len(raw) - 1
                out.append(_decode(raw[:end + 1] if end >= 0 else raw, path, cut=True))
            return out, True
    except OSError as e:
        raise CalibrationError(f"{path}: cannot be read ({e}); check that it is yours to read") from e


def _decode(raw: bytes, path: Path, *, cut: bool) -> str:
    """UTF-8 text; with ``cut`` the last character may be incomplete and is left out."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(raw, final=not cut)
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{path}: is not UTF-8 text ({e.reason} at byte {e.start}); convert it, "
                               "e.g. with iconv, or name a text file") from e
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _json_list(path: Path, budget: int) -> list[Any] | None:
    """The rows of a ``.json`` file that holds one list; None when it does not, so that it is read as lines."""
    with open(path, "rb") as f:
        if not f.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            return None
    limit = max(budget, 256_000_000)  # a list can only be parsed whole
    if path.stat().st_size > limit:
        raise CalibrationError(f"{path}: a JSON list of more than {limit} bytes; make it JSONL, which is read in part")
    try:
        rows = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise CalibrationError(f"{path}: is not valid JSON ({e}); needs a list of rows, or JSONL") from e
    return rows if isinstance(rows, list) else None


def _rows_to_documents(source: str, rows: Iterable[tuple[int, Any]], column: str | None = None) -> Documents:
    """Documents of numbered rows (a JSON line, or what one holds); what cannot be used is counted and reported."""
    out, total, dropped = Documents(source), 0, []
    for number, row in rows:
        total += 1
        try:
            out.items.append(_document(json.loads(row) if isinstance(row, str) and column is None else row, column))
        except json.JSONDecodeError as e:
            dropped.append(f"row {number}: not valid JSON ({e.msg})")
        except (ValueError, RecursionError) as e:
            dropped.append(f"row {number}: {e}")
    if dropped:
        out.warnings.append(f"{source}: {len(dropped)} of {total} rows were dropped; the first is {dropped[0]}")
    return out


def _document(row: Any, column: str | None = None) -> Document:
    """One row as a document. Raises ValueError with the reason when it is none."""
    if not isinstance(row, dict):
        raise ValueError(f"a JSON {type(row).__name__}, needs an object")
    name = column or next((k for k in ("messages", "conversations", "text") if k in row), None)
    if name is None or name not in row:
        raise ValueError(f"has no {column or 'messages, conversations or text'}, only {', '.join(map(str, row))[:80]}")
    value = row[name]
    if isinstance(value, str):
        if not value.strip():
            raise ValueError(f"{name} is empty")
        return Document(text=_encodable(value))
    if not isinstance(value, list) or not value:
        raise ValueError(f"{name} is neither a text nor a list of messages")
    return Document(messages=[_message(m) for m in value])


def _message(raw: Any) -> dict[str, Any]:
    """``{role, content}`` from that or from ShareGPT's ``{from, value}``; lists of text parts are joined."""
    if not isinstance(raw, dict):
        raise ValueError("a message is not an object")
    role = raw.get("role", raw.get("from"))
    content = raw.get("content", raw.get("value"))
    if isinstance(content, list):
        parts = [p.get("text") if isinstance(p, dict) else p for p in content]
        texts = [p for p in parts if isinstance(p, str)]
        content = "".join(texts) if len(texts) == len(parts) else None  # an image or a call would be lost
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError("a message lacks a role or a text content")
    rest = {k: v for k, v in raw.items() if k not in ("role", "from", "content", "value")}
    return {**rest, "role": _ROLES.get(role, role), "content": _encodable(content)}


def _encodable(text: str) -> str:
    """The text, or a ValueError when it has half of a surrogate pair, which JSON can write and no tokenizer reads."""
    text.encode()
    return text


def _read_dataset(source: str, budget: int, *, seed: int | None) -> Documents:
    """The first rows of a streamed dataset, shuffled within a buffer when a seed is given."""
    try:
        from datasets import load_dataset
    except ImportError as e:
        raise CalibrationError(f"{source}: needs the datasets package; pip install 'fewbits[datasets]', "
                               "or pass a text file") from e
    address, _, column = source.removeprefix("hf:").partition("#")
    name, *rest = address.split(":")
    if not name or len(rest) > 2:
        raise CalibrationError(f"{source}: is not {_HF_SYNTAX}, e.g. hf:wikitext:wikitext-2-raw-v1:validation")
    config, split = [*rest, "", ""][:2]
    rows, size, more = [], 0, False
    try:
        stream = load_dataset(name, config or None, split=split or "train", streaming=True)
        for row in stream if seed is None else stream.shuffle(seed=seed, buffer_size=1000):
            rows.append(row)
            size += len(str(row.get(column, row)))
            if size >= budget:
                more = True
                break
    # missing data sets, configs, splits, networks and credentials all arrive as one of these
    except (OSError, ValueError, KeyError, RuntimeError) as e:
        raise CalibrationError(f"{source}: cannot be loaded ({type(e).__name__}: {str(e)[:200]}); "
                               f"the syntax is {_HF_SYNTAX}, and offline only cached data sets load") from e
    out = _rows_to_documents(source, enumerate(rows, 1), column or None)
    out.more = more
    return out


def default_documents() -> list[Document]:
    """The topics of CPython's ``help()``: prose about a language, which every installation carries.

    Without those that evaluation holds out as its own default text.
    """
    from fewbits.eval.text import is_held_out

    try:
        from pydoc_data.topics import topics
    except ImportError as e:
        raise CalibrationError("default: this Python lacks pydoc_data; pass a text file of your own") from e
    seen: set[str] = set()  # topics quote one another at length
    texts = [_clean_rst(topics[key], seen) for key in sorted(topics) if not is_held_out(key)]
    return [Document(text=text) for text in texts if len(text) > 200]


def _clean_rst(text: str, seen: set[str]) -> str:
    """Prose of a reStructuredText rendering: no rules, no inline marks, paragraphs on one line and only once."""
    text = re.sub(r"^[ \t]*[*=\-~^\"#+|]{3,}[ \t]*$\n?", "", text, flags=re.M)  # heading rules, table borders
    text = re.sub(r"``([^`\n]+)``|\"([^\"\n]+)\"", lambda m: m.group(1) or m.group(2), text)
    text = re.sub(r"(?<!\w)\*{1,2}([^*\n]+)\*{1,2}(?!\w)", r"\1", text)
    blocks = [b for b in re.split(r"\n[ \t]*\n", text) if b.strip()]
    prose = [re.sub(r"\s+", " ", b).strip() if not b.startswith("    ") else b.rstrip() for b in blocks]
    fresh = [p for p in dict.fromkeys(prose) if p not in seen]
    seen.update(fresh)
    return "\n\n".join(fresh)

"""The tokenizer of a checkpoint as GGUF has it: tokens and merges, and the name of what splits text into words.

llama.cpp knows the rules that split text by name alone. The name is found by what the tokenizer does (the steps of its
pre-tokenizer), and rules that have none are refused: a file with the wrong name works, and is quietly worse.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fewbits.quant.errors import ModelError
from fewbits.serving.export.stored import Stored

_WAY_OUT = "convert the tokenizer with llama.cpp's own tools, or use the checkpoint with fewbits"

# The regular expression of Llama 3 and that of Qwen 2, which differ in how many digits make a word.
_WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")

_SPLITTERS: dict[tuple[tuple[str, ...], bool], str] = {
    (("gpt-2 words",), False): "gpt-2",
    (("digits", "gpt-2 words"), False): "smollm",
    ((_WORDS % "", "bytes"), False): "qwen2",
    ((_WORDS % "{1,3}", "bytes"), False): "smaug-bpe",
    ((_WORDS % "{1,3}", "bytes"), True): "llama-bpe",
}
"""Steps of the pre-tokenizer, and whether whole words are looked up before merges -> ``tokenizer.ggml.pre``."""

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)


@dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, the type of each, and where the tokenizer needs them their scores, or its merges."""

    tokens: list[str]
    types: list[int]
    scores: list[float] | None = None
    merges: list[str] | None = None


def add_tokenizer(writer: Any, stored: Stored) -> None:
    """Write the tokenizer that lies beside the weights.

    Raises:
        ModelError: there is none, or it is none that llama.cpp has.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(stored.path)
        spec = json.loads(tokenizer.backend_tokenizer.to_str())
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise ModelError(f"{stored.path}: has no tokenizer.json that can be read ({' '.join(str(error).split())[:200]}"
                         "); put the model's tokenizer beside the weights") from error
    if spec["model"]["type"] != "BPE":
        raise ModelError(f"tokenizer: got a {spec['model']['type']} model, gguf takes BPE; {_WAY_OUT}")
    size = stored.model.config.vocab_size
    if spec["model"].get("byte_fallback"):
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_add_space_prefix(_space_prefix(spec))
        vocabulary = _sentencepiece(spec, size)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(splitter(spec))
        vocabulary = _byte_level(spec, size)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    _add_special(writer, tokenizer)


def splitter(spec: Mapping[str, Any]) -> str:
    """llama.cpp's name for what splits text into words, from the contents of a ``tokenizer.json``.

    Raises:
        ModelError: it has none.
    """
    model, normalizer = spec["model"], spec.get("normalizer")
    steps = tuple(_step(s) for s in _sequence(spec.get("pre_tokenizer"), "pretokenizers"))
    found = _SPLITTERS.get((steps, bool(model.get("ignore_merges"))))
    # NFC is left out by llama.cpp's own conversion too: text that people write is composed already.
    plain = {s["type"] for s in _sequence(normalizer, "normalizers")} <= {"NFC"}
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix") or model.get("dropout")
    if found is None or not plain or affixes:
        known = ", ".join(dict.fromkeys(_SPLITTERS.values()))
        raise ModelError(f"tokenizer: splits text by {_short(spec.get('pre_tokenizer'))} after {_short(normalizer)}, "
                         f"for which llama.cpp has no name that is known here ({known}); {_WAY_OUT}")
    return found


def _short(step: Any) -> str:
    return json.dumps(step)[:160]


def _sequence(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _step(step: Mapping[str, Any]) -> str:
    """What a pre-tokenizer does; one that is not known is its own JSON, which nothing equals."""
    if step["type"] == "ByteLevel" and not step["add_prefix_space"]:
        return "gpt-2 words" if step["use_regex"] else "bytes"
    if step["type"] == "Digits" and step["individual_digits"]:
        return "digits"
    if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return str(step["pattern"].get("Regex", step["pattern"]))
    return json.dumps(step)


def _byte_level(spec: Mapping[str, Any], size: int) -> Vocabulary:
    tokens, types = _tokens(spec, size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    return Vocabulary(tokens, types, merges=merges)


def _tokens(spec: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Tokens by id and their types, filled up to the rows of the embedding."""
    by_id = {i: (token, _NORMAL) for token, i in spec["model"]["vocab"].items()}
    for added in spec["added_tokens"]:
        by_id[added["id"]] = (added["content"], _CONTROL if added["special"] else _USER_DEFINED)
    if (last := max(by_id)) >= size:
        raise ModelError(f"tokenizer: token {by_id[last][0]!r} has the number {last}, the embedding has {size} rows; "
                         "put the tokenizer of this model beside the weights")
    rows = [by_id.get(i, (f"[PAD{i}]", _UNUSED)) for i in range(size)]
    return [token for token, _ in rows], [kind for _, kind in rows]


# -- tokenizers made from a SentencePiece model, as Llama 2 and Mistral have them -------------------------------------


def _space_prefix(spec: Mapping[str, Any]) -> bool:
    """Whether a space is put before the text. Raises ModelError for what SentencePiece does not do."""
    normal = _sequence(spec.get("normalizer"), "normalizers")
    before = _sequence(spec.get("pre_tokenizer"), "pretokenizers")
    kinds = [s["type"] for s in [*normal, *before]]
    if kinds == ["Metaspace"] and before[0]["replacement"] == "▁" and not before[0]["split"]:
        return bool(before[0]["prepend_scheme"] != "never")
    if kinds in (["Replace"], ["Prepend", "Replace"]):
        replaced = normal[-1]
        if replaced["content"] == "▁" == normal[0].get("prepend", "▁") and replaced["pattern"] == {"String": " "}:
            return kinds[0] == "Prepend"
    raise ModelError(f"tokenizer: splits text by {_short(spec.get('pre_tokenizer'))} after "
                     f"{_short(spec.get('normalizer'))}, needed what SentencePiece does; {_WAY_OUT}")


def _sentencepiece(spec: Mapping[str, Any], size: int) -> Vocabulary:
    """llama.cpp merges the pair whose token has the highest score: minus the number of the merge that makes it."""
    tokens, types = _tokens(spec, size)
    made: dict[str, int] = {}
    for rank, merge in enumerate(spec["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        made.setdefault(left + right, rank)
    unknown = spec["model"].get("unk_token")
    for i, token in enumerate(tokens):
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            types[i] = _BYTE
        elif token == unknown:
            types[i] = _UNKNOWN
    scores = [-float(made.get(token, len(made))) for token in tokens]
    return Vocabulary(tokens, types, scores=scores)


def _add_special(writer: Any, tokenizer: Any) -> None:
    """Which tokens mark beginning, end and padding, whether they are put around a text, and the chat template."""
    for kind in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(token)
    bare, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    writer.add_add_bos_token(whole[:1] == [tokenizer.bos_token_id] != bare[:1])
    writer.add_add_eos_token(whole[-1:] == [tokenizer.eos_token_id] != bare[-1:])
    if isinstance(template := tokenizer.chat_template, str):
        writer.add_chat_template(template)

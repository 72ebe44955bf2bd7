"""Calibration rows: what is packed, drawn, refused and warned of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.calibration.data import _choose, _quotas, fingerprint, load_calibration, pack, self_generate
from fewbits.calibration.documents import read_documents
from fewbits.quant.errors import CalibrationError

Tiny = Callable[[str], Path]
PAD, BOS, EOS = 0, 1, 2
TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
CHAT = {"messages": [{"role": "user", "content": "What is two and two?"}, {"role": "assistant", "content": "Four."}]}


def tokenizer_of(tiny: Tiny, *, chat: str | None = None, bos: bool = False) -> Any:
    """The byte-level tokenizer of the tiny models; ``bos`` makes it begin text with ``<s>``, as Llama's does."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    tokenizer.chat_template = chat
    if bos:
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)])
    return tokenizer


@pytest.fixture
def plain(tiny: Tiny) -> Any:
    return tokenizer_of(tiny)


@pytest.fixture
def chat(tiny: Tiny) -> Any:
    return tokenizer_of(tiny, chat=TEMPLATE)


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def write(path: Path, rows: list) -> str:
    """JSONL; strings are written as they are."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


def prose(n: int) -> str:
    """About ``12 n`` characters without repetition."""
    return "".join(f"sentence {i}.\n" for i in range(n))


# packing


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(3, 255), max_size=200), st.integers(2, 40), st.sampled_from([None, BOS]))
def test_rows_are_the_slices_of_the_stream(stream: list[int], seqlen: int, bos: int | None) -> None:
    tokens, mask = pack(torch.tensor(stream, dtype=torch.int64), seqlen, bos=bos, pad=PAD)
    width = seqlen - (bos is not None)
    assert tokens.shape == mask.shape == (len(tokens), seqlen) and tokens.dtype == torch.int64
    if bos is not None:
        assert (tokens[:, 0] == bos).all() and (tokens[:, 1:] != bos).all()
    body = tokens[:, seqlen - width:][mask[:, seqlen - width:]].tolist()
    assert body == stream[:len(body)]
    assert len(stream) - len(body) < width  # only a tail is lost
    if stream:
        assert len(body) > 0 and bool(mask.all()) == (len(stream) >= width)
    else:
        assert len(tokens) == 0


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6), st.integers(1, 100))
def test_quotas_are_even_and_complete(available: list[int], samples: int) -> None:
    quotas = _quotas(available, samples)
    assert sum(quotas) == min(samples, sum(available))
    assert all(0 <= q <= n for q, n in zip(quotas, available))
    for q, n in zip(quotas, available):  # who has rows left over got as many as anyone, but for the remainder
        if q < n:
            assert q >= max(quotas) - 1


@given(st.integers(1, 200), st.integers(0, 5))
def test_choose_draws_without_replacement(rows: int, seed: int) -> None:
    drawn = _choose(rows, rows // 2, seed).tolist()
    assert len(set(drawn)) == len(drawn) == rows // 2 and all(0 <= i < rows for i in drawn)


def test_first_rows_of_a_text(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(100))
    data = load_calibration([str(tmp_path / "a.txt")], plain, samples=10, seqlen=32, order="first")
    assert data.tokens.flatten().tolist() == encode(plain, prose(100))[:320]
    assert data.mask.all() and data.n_tokens == 320 and data.warnings == []
    assert data.sources == [f"{tmp_path / 'a.txt'}: 10 rows"]
    digest = hashlib.sha256(data.tokens.numpy().tobytes() + data.mask.numpy().tobytes()).hexdigest()
    assert data.fingerprint == digest == fingerprint(data.tokens, data.mask)


def test_random_rows_are_rows_of_the_text_and_follow_the_seed(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(200))
    source = str(tmp_path / "a.txt")
    everything = load_calibration(source, plain, samples=500, seqlen=32, order="first")
    rows = {tuple(r) for r in everything.tokens.tolist()}
    one, again, other = (load_calibration([source], plain, samples=20, seqlen=32, seed=s) for s in (1, 1, 2))
    assert len({tuple(r) for r in one.tokens.tolist()} & rows) == 20
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert torch.equal(one.tokens, again.tokens)


def test_bos_once_per_row(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny, bos=True)
    (tmp_path / "a.txt").write_text(prose(100))
    data = load_calibration([str(tmp_path / "a.txt")], tokenizer, samples=10, seqlen=32, order="first")
    assert (data.tokens[:, 0] == BOS).all() and (data.tokens[:, 1:] != BOS).all()
    assert data.tokens[:, 1:].flatten().tolist() == encode(tokenizer, prose(100))[:310]
    assert data.warnings == []


def test_documents_are_joined_with_eos(plain: Any, tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}, {"text": "three"}])
    data = load_calibration([source], plain, samples=1, seqlen=13)
    expected = [*encode(plain, "one"), EOS, *encode(plain, "two"), EOS, *encode(plain, "three")]
    assert data.tokens.tolist() == [expected]


def test_short_text_makes_one_padded_row(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    data = load_calibration([str(tmp_path / "a.txt")], plain, samples=4, seqlen=16)
    assert data.tokens.shape == (1, 16) and data.mask.tolist() == [[True] * 5 + [False] * 11]
    assert data.n_tokens == 5 and data.tokens[0, 5:].eq(PAD).all()
    assert any("1 calibration rows" in w and "4 asked" in w for w in data.warnings)


def test_sources_share_the_rows(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(500))
    (tmp_path / "b.txt").write_text("x" * 64)
    data = load_calibration([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], plain, samples=20, seqlen=32)
    assert [s.rsplit(": ")[1] for s in data.sources] == ["18 rows", "2 rows"] and len(data.tokens) == 20


# conversations


@pytest.mark.parametrize("row", [
    CHAT,
    {"conversations": [{"from": "human", "value": "What is two and two?"}, {"from": "gpt", "value": "Four."}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "What is "}, {"type": "text",
                                                                                     "text": "two and two?"}]},
                  {"role": "assistant", "content": "Four."}]},
])
def test_conversations_go_through_the_template(chat: Any, tmp_path: Path, row: dict) -> None:
    data = load_calibration([write(tmp_path / "c.jsonl", [row] * 2)], chat, samples=3, seqlen=32, order="first")
    text = "<s>user: What is two and two?</s>\n<s>assistant: Four.</s>\n"
    expected = encode(chat, text) * 2  # the template ends with EOS, so none is put between
    assert data.tokens.flatten().tolist() == expected[:data.tokens.numel()]
    assert not any("chat template" in w or "BOS" in w for w in data.warnings)


def test_double_bos_is_kept_once_and_said(tiny: Tiny, tmp_path: Path) -> None:
    tokenizer = tokenizer_of(tiny, chat=TEMPLATE, bos=True)
    data = load_calibration([write(tmp_path / "c.jsonl", [CHAT] * 5)], tokenizer, samples=2, seqlen=64, order="first")
    assert data.tokens[0, 0] == BOS and data.tokens[0, 1] != BOS
    assert any(w.startswith("double BOS") for w in data.warnings)
    silent = tokenizer_of(tiny, chat=TEMPLATE.replace("<s>", ""), bos=True)
    data = load_calibration([write(tmp_path / "c.jsonl", [CHAT] * 5)], silent, samples=2, seqlen=64, order="first")
    assert not any("BOS" in w for w in data.warnings)


def test_conversations_without_a_template_are_refused(plain: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"c\.jsonl: has conversations, but .* no chat template"):
        load_calibration([write(tmp_path / "c.jsonl", [CHAT])], plain)


def test_conversations_that_the_template_refuses_are_counted(tiny: Tiny, tmp_path: Path) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + TEMPLATE
    tokenizer = tokenizer_of(tiny, chat=strict)
    bad = {"messages": [{"role": "system", "content": "x"}]}
    data = load_calibration([write(tmp_path / "c.jsonl", [CHAT, bad, CHAT])], tokenizer, samples=1, seqlen=32)
    assert any("refused 1 of 3" in w and "user first" in w for w in data.warnings)
    with pytest.raises(CalibrationError, match=r"no usable tokens.*user first"):
        load_calibration([write(tmp_path / "c.jsonl", [bad])], tokenizer)


# rows that cannot be used


@pytest.mark.parametrize(("row", "reason"), [
    ("{broken", "not valid JSON"), ("7", "needs an object"), ("[" * 100_000, "row 2"),
    ({"prompt": "x"}, "only prompt"), ({"text": "  "}, "empty"), ({"text": None}, "neither"),
    ({"messages": []}, "neither"), ({"messages": ["x"]}, "not an object"),
    ({"messages": [{"role": "user"}]}, "lacks a role or a text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "lacks a role or a text"),
    ('{"text": "\\ud800"}', "surrogates"),
])
def test_dropped_rows_are_counted(plain: Any, tmp_path: Path, row: Any, reason: str) -> None:
    source = write(tmp_path / "a.jsonl", [{"text": "a good row, and a long one"}, row, ""])
    data = load_calibration([source], plain, samples=1, seqlen=16)
    assert [w for w in data.warnings if "1 of 2 rows were dropped" in w and reason in w], data.warnings


def test_nothing_usable(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match="no usable tokens"):
        load_calibration([str(tmp_path / "empty.txt")], plain)
    with pytest.raises(CalibrationError, match="1 of 1 rows were dropped"):
        load_calibration([write(tmp_path / "a.jsonl", ["x"])], plain)


@pytest.mark.parametrize(("kwargs", "message"), [
    ({"sources": []}, "no sources"), ({"samples": 0}, "samples: got 0"), ({"seqlen": 1}, "seqlen: got 1"),
    ({"order": "sorted"}, "order: got 'sorted'"), ({"sources": ["/nope.txt"]}, "no such file"),
    ({"sources": ["self"]}, "cannot generate"), ({"sources": ["hf:a:b:c:d"]}, "is not hf:NAME"),
    ({"sources": ["hf:"]}, "is not hf:NAME"),
])
def test_arguments(plain: Any, kwargs: dict, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load_calibration(**{"sources": ["default"], "tokenizer": plain, **kwargs})


def test_files_that_are_not_text(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(CalibrationError, match="not UTF-8"):
        load_calibration([str(tmp_path / "a.txt")], plain)
    with pytest.raises(CalibrationError, match="directory"):
        load_calibration([str(tmp_path)], plain)
    (tmp_path / "a.json").write_text("[1, ")
    with pytest.raises(CalibrationError, match="not valid JSON"):
        load_calibration([str(tmp_path / "a.json")], plain)


# bounded reading


def test_first_reads_on_until_it_has_enough(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.calibration.data._MIN_BUDGET", 100)
    monkeypatch.setattr("fewbits.calibration.data._BYTES_PER_TOKEN", 1)
    (tmp_path / "a.txt").write_text(prose(1000))
    data = load_calibration([str(tmp_path / "a.txt")], plain, samples=10, seqlen=64, order="first")
    assert data.tokens.flatten().tolist() == encode(plain, prose(1000))[:640]


def test_long_texts_are_tokenized_in_pieces(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewbits.calibration.data._PIECE", 100)
    (tmp_path / "a.txt").write_text(prose(100) + "x" * 500)
    data = load_calibration([str(tmp_path / "a.txt")], plain, samples=1000, seqlen=32, order="first")
    whole = encode(plain, prose(100) + "x" * 500)
    assert data.tokens.flatten().tolist() == whole[:data.tokens.numel()]


# the other sources


def test_default_is_clean_prose(plain: Any) -> None:
    documents = read_documents("default", 0, spread=True)
    text = "\n\n".join(d.text for d in documents.items)
    assert documents.name.startswith("default (") and len(text) > 200_000
    assert "\n****" not in text and "\n====" not in text and "``" not in text
    data = load_calibration(["default"], plain, samples=16, seqlen=64)
    assert data.tokens.shape == (16, 64) and data.warnings == []


def test_dataset(plain: Any, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    write(tmp_path / "train.jsonl", [{"body": f"text number {i}", "n": i} for i in range(50)])
    data = load_calibration([f"hf:{tmp_path}#body"], plain, samples=4, seqlen=16, order="first")
    expected = [t for i in range(50) for t in [*encode(plain, f"text number {i}"), EOS]]
    assert data.tokens.flatten().tolist() == expected[:64]
    one, again = (load_calibration([f"hf:{tmp_path}#body"], plain, samples=4, seqlen=16, seed=3) for _ in range(2))
    assert one.fingerprint == again.fingerprint
    with pytest.raises(CalibrationError, match="50 of 50 rows were dropped"):
        load_calibration([f"hf:{tmp_path}"], plain)
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        load_calibration([f"hf:{tmp_path}::nosuchsplit"], plain)
    with pytest.raises(CalibrationError, match="cannot be loaded"):
        load_calibration(["hf:fewbits-tests/there-is-no-such-dataset"], plain)


@pytest.fixture
def model(tiny: Tiny) -> Any:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(tiny("llama"), dtype=torch.float32).eval()


def test_self(chat: Any, model: Any) -> None:
    def generate(rows: int, length: int, seed: int) -> torch.Tensor:
        return self_generate(model, chat, rows, length, seed=seed)

    one, again, other = (load_calibration(["self"], chat, samples=18, seqlen=12, seed=s, generate=generate)
                         for s in (0, 0, 1))
    assert one.tokens.shape == (18, 12) and one.tokens.max() < len(chat)
    assert (one.tokens[:, :7] == torch.tensor(encode(chat, "<s>user: "))).all()  # the template's turn of a user
    assert one.fingerprint == again.fingerprint != other.fingerprint
    assert one.warnings == []  # the model's own text counts as what it will be used for


def test_self_of_a_plain_model_begins_with_bos(tiny: Tiny, model: Any) -> None:
    strict = tokenizer_of(tiny, chat="{{ raise_exception('never') }}")
    for tokenizer in (tokenizer_of(tiny), strict):
        tokens = self_generate(model, tokenizer, 40, 4, seed=0)  # more than one batch
        assert tokens.shape == (40, 4) and (tokens[:, 0] == BOS).all() and len(tokens[:, 1:].unique(dim=0)) > 20
    silent = tokenizer_of(tiny, chat=TEMPLATE.replace("<s>", ""), bos=True)
    assert self_generate(model, silent, 1, 12, seed=0)[0, :7].tolist() == [BOS, *encode(silent, "user: ")]


def test_self_without_bos_begins_with_ordinary_tokens(plain: Any, model: Any) -> None:
    plain.bos_token = None
    tokens = self_generate(model, plain, 20, 4, seed=0)
    assert not set(tokens[:, 0].tolist()) & set(plain.all_special_ids)
    assert len(set(tokens[:, 0].tolist())) > 5


def test_self_samples_the_models_distribution(plain: Any, model: Any) -> None:
    """Nearly no temperature is greedy decoding, with the cache and without it alike."""
    tokens = self_generate(model, plain, 1, 8, seed=0, temperature=1e-4)
    with torch.no_grad():
        logits = model(tokens).logits[0, :-1, :len(plain)]
    assert logits.argmax(-1).tolist() == tokens[0, 1:].tolist()


def test_self_of_a_broken_model(plain: Any, model: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        self_generate(model, plain, 1, 4, seed=0)


# lint at loading


def test_missing_bos(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(50))
    for says, does, warned in ((True, False, True), (True, True, False), (False, False, False)):
        tokenizer = tokenizer_of(tiny, bos=does)
        object.__setattr__(tokenizer, "_add_bos_token", says)
        data = load_calibration([str(tmp_path / "a.txt")], tokenizer, samples=4, seqlen=32)
        assert any(w.startswith("missing BOS") for w in data.warnings) == warned


def test_plain_text_for_a_chat_model(chat: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(50))
    sources = [str(tmp_path / "a.txt"), write(tmp_path / "c.jsonl", [CHAT])]
    alone = load_calibration(sources[:1], chat, samples=2, seqlen=32)
    mixed = load_calibration(sources, chat, samples=2, seqlen=32)
    assert any("all calibration text is plain" in w for w in alone.warnings)
    assert not any("plain" in w for w in mixed.warnings)


def test_rows_held_out_are_not_calibrated_on(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(prose(50))
    all_ = load_calibration([str(tmp_path / "a.txt")], plain, samples=20, seqlen=16)
    left, held = all_.hold_out(3)
    assert len(left.tokens) == len(all_.tokens) - 3 and left.fingerprint != all_.fingerprint
    rows = [tuple(r.tolist()) for r in all_.tokens]
    assert sorted([*map(tuple, left.tokens.tolist()), *(tuple(h.tolist()) for h in held)]) == sorted(rows)
    assert "3 of the 20 rows are held out to judge by, so 17 are calibrated on" in left.warnings


def test_duplicate_rows(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("0123456789abcde\n" * 4 + prose(20))
    data = load_calibration([str(tmp_path / "a.txt")], plain, samples=8, seqlen=16, order="first")
    assert [w for w in data.warnings if w.startswith("3 of 8 calibration rows are duplicates")]


# the protocol of the published comparisons

DETOKENIZE = [(" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" ,", ","), (" .", "."), (" ;", ";"), (" :", ":"),
              (" 's", "'s"), ("( ", "("), (" )", ")"), (" n't", "n't")]


def test_detokenized_wikitext_first_rows(plain: Any, data_dir: Path, tmp_path: Path) -> None:
    """Detokenized WikiText-2 valid, its first 128 x 512 tokens, contiguous, nothing in front or between."""
    valid = data_dir / "wikitext2" / "valid.txt"
    if not valid.is_file():
        pytest.skip("FEWBITS_DATA has no wikitext2/valid.txt")
    text = valid.read_text(encoding="utf-8")
    for old, new in DETOKENIZE:
        text = text.replace(old, new)
    assert hashlib.sha256(text.encode()).hexdigest().startswith("46a5e29fbceb358b")
    (tmp_path / "valid.txt").write_text(text, encoding="utf-8")
    data = load_calibration([str(tmp_path / "valid.txt")], plain, samples=128, seqlen=512, order="first")
    assert data.tokens.shape == (128, 512) and data.mask.all() and data.warnings == []
    assert data.tokens.flatten().tolist() == encode(plain, text[:200_000])[:128 * 512]

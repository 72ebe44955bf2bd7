"""Reading of sources: bounded, whole lines only, and any row is a document or is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.calibration.documents import SLICES, _rows_to_documents, read_documents


@settings(max_examples=100, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["text", "messages", "role", "content", "from", "value"]), inner, max_size=3),
    max_leaves=8))
def test_any_json_is_a_document_or_a_dropped_row(row: Any) -> None:
    out = _rows_to_documents("x", [(1, row)])
    assert len(out.items) + len(out.warnings) == 1


def test_json_list_and_marks_of_windows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + json.dumps([{"text": "one"}, {"text": "two"}]).encode())
    with_mark = read_documents(str(tmp_path / "a.json"), 1000, spread=False)
    assert [d.text for d in with_mark.items] == ["one", "two"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo")
    assert read_documents(str(tmp_path / "a.txt"), 1000, spread=False).items[0].text == "one\ntwo"


@pytest.mark.parametrize("line", ["a line of text {}\n", "\u4e2d\u6587{} ", "{}\U0001f600"])
def test_slices_of_a_large_file(tmp_path: Path, line: str) -> None:
    text = "".join(line.format(i) for i in range(40_000))
    (tmp_path / "a.txt").write_text(text)
    budget = 64_000
    out = read_documents(str(tmp_path / "a.txt"), budget, spread=True)
    assert out.more and len(out.items) == SLICES and "evenly spaced" in out.warnings[0]
    assert sum(len(d.text.encode()) for d in out.items) <= budget
    positions = [text.find(d.text) for d in out.items]
    assert positions == sorted(positions) and positions[0] == 0 and positions[-1] > 0.9 * len(text)
    if "\n" in line:
        assert all(d.text.startswith("a line") and d.text.endswith("\n") for d in out.items)
    first = read_documents(str(tmp_path / "a.txt"), budget, spread=False)
    assert first.more and text.startswith(first.items[0].text) and len(first.items[0].text.encode()) > budget - 100


def test_slices_of_jsonl_drop_no_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(20_000)))
    out = read_documents(str(path), 32_000, spread=True)
    assert out.more and len(out.items) > 1000 and not any("dropped" in w for w in out.warnings)

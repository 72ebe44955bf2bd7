"""How text becomes windows, and the error of a mean."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fewbits.eval.estimate import mean_of_windows
from fewbits.eval.text import Text, cut_windows, default_text, is_held_out, read_text
from fewbits.quant.errors import FewbitsError


def scored(windows):
    """(token, tokens of context before it) of every scored target; tokens are their own positions."""
    return [(int(w.ids[i]), i) for w in windows for i in range(w.first_target, len(w.ids))]


def test_windows_side_by_side_drop_the_tail_and_each_first_token():
    windows = cut_windows(torch.arange(23), window=5)
    assert [w.ids.tolist() for w in windows] == [list(range(i, i + 5)) for i in (0, 5, 10, 15)]
    assert [t for t, _ in scored(windows)] == [t for t in range(20) if t % 5]
    assert all(w.first_position == 0 for w in windows)


@pytest.mark.parametrize("window, stride", [(8, 3), (8, 1), (5, 5), (6, 4)])
def test_strided_windows_score_each_token_once_with_enough_context(window, stride):
    windows = cut_windows(torch.arange(40), window=window, stride=stride)
    targets = scored(windows)
    last = int(windows[-1].ids[-1])
    first = {int(w.ids[0]) for w in windows} if stride == window else {0}
    assert [t for t, _ in targets] == [t for t in range(last + 1) if t not in first]
    assert all(context >= window - stride for t, context in targets if t >= window)
    compared = [int(w.ids[i]) for w in windows for i in range(w.first_position, len(w.ids))]
    assert compared == list(range(last + 1))


@pytest.mark.parametrize("stride", [None, 2])
def test_bos_leads_every_window_and_lets_every_token_be_scored(stride):
    windows = cut_windows(torch.arange(10, 30), window=6, stride=stride, bos=1)
    assert all(w.ids[0] == 1 and len(w.ids) == 6 for w in windows)
    assert [t for t, _ in scored(windows)] == list(range(10, 1 + int(windows[-1].ids[-1])))


def test_limit_and_short_text():
    assert len(cut_windows(torch.arange(100), window=10, limit=3)) == 3
    (only,) = cut_windows(torch.arange(4), window=10)
    assert only.ids.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("tokens, options, words", [
    (1, {"window": 8}, "at least 2"), (0, {"window": 8, "bos": 1}, "at least 2"),
    (20, {"window": 8, "stride": 9}, "--stride 9"), (20, {"window": 8, "stride": 0}, "--stride 0"),
    (20, {"window": 8, "stride": 8, "bos": 1}, "--stride 8"),
])
def test_windows_that_cannot_be(tokens, options, words):
    with pytest.raises(FewbitsError, match=words):
        cut_windows(torch.arange(tokens), **options)


def test_default_text_is_the_held_out_part():
    from pydoc_data.topics import topics

    text = default_text()
    held = [name for name in topics if is_held_out(name)]
    assert 5 < len(held) < len(topics) / 2
    assert all(topics[name] in text.content for name in held)
    assert not any(topics[name] in text.content for name in topics if name not in held)
    assert "held-out" in text.name and "CPython" in text.name


def test_read_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("ä\r\nb".encode())
    assert read_text(path) == Text(str(path), "ä\r\nb")
    for content, words in ((b"", "is empty"), (b" \n", "is empty"), (b"ab\xff", "byte 2 is not UTF-8")):
        path.write_bytes(content)
        with pytest.raises(FewbitsError, match=words):
            read_text(path)
    with pytest.raises(FewbitsError, match="no such file"):
        read_text(tmp_path / "none.txt")
    with pytest.raises(FewbitsError, match="is a directory"):
        read_text(tmp_path)


def test_error_of_a_mean_covers_the_truth_when_neighbours_are_alike():
    """Values that share their window's level: the error over tokens would be five times too small."""
    rng = np.random.default_rng(0)
    errors, stated = [], []
    for _ in range(300):
        windows = [rng.normal(rng.normal(), 0.5, size=100) for _ in range(12)]
        estimate = mean_of_windows(windows)
        errors.append(estimate.mean)
        stated.append(estimate.stderr)
    assert np.std(errors) == pytest.approx(np.mean(stated), rel=0.15)
    assert estimate.count == 1200 and "12 windows" in estimate.method


def test_error_with_few_windows_comes_from_blocks():
    values = np.arange(40.0)
    assert "10 blocks of 4" in mean_of_windows([values]).method
    assert mean_of_windows([np.array([3.0])]).stderr is None
    iid = mean_of_windows([np.arange(9.0)])
    assert iid.stderr == pytest.approx(np.arange(9.0).std(ddof=1) / math.sqrt(9))

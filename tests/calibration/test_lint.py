"""Each rule once with what it warns of, and once with what it must leave alone."""

from __future__ import annotations

import torch

from fewbits.calibration.lint import lint_experts, lint_rows, lint_tokens


def test_tokens_per_column() -> None:
    widths = {"q_proj": 64, "down_proj": 256, "up_proj": 100}
    assert lint_tokens(1024, widths) == []
    (warning,) = lint_tokens(399, widths)
    assert "2 of 3 matrices" in warning and "down_proj: K = 256 needs 1024 tokens, got 399" in warning
    assert lint_tokens(0, {}) == []


def test_starved_experts() -> None:
    counts = {"experts.0": 5000, "experts.1": 49, "experts.2": 50, "experts.3": 0}
    (warning,) = lint_experts(counts, 10_000)
    assert "2 of 4 experts" in warning and "experts.3 (0), experts.1 (49)" in warning and "experts.2" not in warning
    assert lint_experts({"experts.0": 50}, 10_000) == []
    (warning,) = lint_experts({"experts.0": 50, "experts.1": 64}, 10_000, widths={"experts.0": 64, "experts.1": 64})
    assert "experts.0 (50)" in warning and "experts.1" not in warning


def test_many_starved_experts_are_not_all_named() -> None:
    (warning,) = lint_experts({f"e{i}": 0 for i in range(100)}, 10_000)
    assert "and 92 more" in warning and len(warning) < 300


def test_duplicates() -> None:
    assert lint_rows(torch.tensor([[1, 2], [2, 1], [1, 3]])) == []
    assert "1 of 3" in lint_rows(torch.tensor([[1, 2], [2, 1], [1, 2]]))[0]

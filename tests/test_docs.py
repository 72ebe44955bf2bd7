"""The commands of the pages about engines, run as they stand, on a tiny model called ./model."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from fewbits.cli.main import main
from tests.conftest import save_tiny_model

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = ["export.md", "llamacpp.md", "sglang.md", "vllm.md"]
NOT_HERE = ("serve", "push", "sweep")
"""Commands that do not end by themselves, that need an account, or that other tests run; as they do with a model of
ternary weights."""


def commands(page: str) -> list[list[str]]:
    """Every line of a page's code that is a command of ours, lines that end in a backslash joined."""
    text = (DOCS / page).read_text().replace("\\\n", " ")
    fenced = "\n".join(text.split("```")[1::2]).splitlines()
    indented = [line for line in text.splitlines() if line.startswith("    ")]
    lines = [line.strip().removeprefix("$ ") for line in [*fenced, *indented]]
    found = [shlex.split(line, comments=True) for line in lines if line.startswith("fewbits ")]
    return [words[1:] for words in found if words[1] not in NOT_HERE and "./ternary" not in words]


@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = " ".join(f"Sentence {i} has {i % 7} words that are of no use." for i in range(20000))
    (tmp_path / "text.txt").write_text(text)
    save_tiny_model(tmp_path / "model", "llama", dtype=torch.float16, max_position_embeddings=1024,
                    hidden_size=256, intermediate_size=512, num_key_value_heads=4)
    found = commands(page)
    assert found, f"{page} shows no command"
    for words in found:
        assert main(words) == 0, f"{page}: fewbits {' '.join(words)}"

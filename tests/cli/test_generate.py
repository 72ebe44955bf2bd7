"""``fewbits generate`` as scripts use it."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest
import torch

from fewbits.cli.main import main

torch.set_num_threads(1)


def greedy(path, text, count):
    """The continuation by a plain loop, without a cache."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    ids = tokenizer(text)["input_ids"]
    start = len(ids)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_greedy_continuation_alone_on_standard_output(tiny):
    path = tiny("llama")
    command = [sys.executable, "-m", "fewbits.cli.main", "generate", str(path), "Hello there", "--max-new-tokens", "6",
               "--threads", "1"]
    run = subprocess.run(command, capture_output=True, check=True)
    assert run.stdout.decode() == "Hello there" + greedy(path, "Hello there", 6) + "\n"
    assert run.stderr.decode().startswith("6 tokens in ")


def test_prompt_from_standard_input(tiny, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("From a pipe"))
    assert main(["generate", str(tiny("llama")), "-", "--max-new-tokens", "2"]) == 0
    assert capsys.readouterr().out.startswith("From a pipe")


def test_chat(tiny, tmp_path, capsys):
    from transformers import AutoTokenizer

    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny("llama") / name).read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(tiny("llama"))
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "Hi", "--chat", "--max-new-tokens", "3"]) == 0
    answer = greedy(tiny("llama"), "user: Hi", 3).lstrip("\n")
    assert capsys.readouterr().out == f"Hi\n\n{answer}\n"


def test_new_tokens_keep_to_the_context(tiny, capsys):
    assert main(["generate", str(tiny("llama")), "x" * 100]) == 0
    assert "28 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("args, words", [
    (["hi", "--chat"], "has no chat template"), (["x" * 130], "context of 128"), ([""], "PROMPT: is empty"),
    (["hi", "--max-new-tokens", "127"], "context of 128"), (["hi", "--max-new-tokens", "0"], "--max-new-tokens"),
    (["hi", "--dtype", "int3"], "--dtype int3"), ([], "Missing argument 'PROMPT'"),
])
def test_bad_input_is_one_line(args, words, tiny, capsys):
    assert main(["generate", str(tiny("llama")), *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and words in err

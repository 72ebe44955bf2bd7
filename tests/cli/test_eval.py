"""``fewbits eval`` as scripts use it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from fewbits.cli.main import main

torch.set_num_threads(1)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("All work and no play makes a dull text. " * 20)
    return str(path)


def test_json_on_standard_output_in_a_process_of_its_own(tiny, text):
    command = [sys.executable, "-m", "fewbits.cli.main", "eval", str(tiny("llama")), "--baseline", str(tiny("llama")),
               "--text", text, text, "--window", "64", "--limit", "2", "--threads", "1", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    out = json.loads(run.stdout)
    assert out["kl_mean"] == 0 and out["top1_agreement"] == 1 and out["tokens"] == 4 * 63
    assert out["perplexity"] == out["perplexity_baseline"] > 1
    assert run.stderr == ""


def test_json_file_and_table(tiny, text, tmp_path, capsys):
    target = tmp_path / "report.json"
    assert main(["eval", "--json", str(target), str(tiny("llama")), "--text", text, "--limit", "1"]) == 0
    out, err = capsys.readouterr()
    assert out == "" and "perplexity" in err and f"wrote {target}" in err
    report = json.loads(target.read_text())
    assert report["model"] == str(tiny("llama")) and "kl_mean" not in report
    assert list(report["per_text"]) == [text]


def test_works_without_text_and_times_decoding(tiny, capsys):
    assert main(["eval", str(tiny("llama")), "--limit", "1", "--speed", "--json"]) == 0
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report["decode_tokens_per_s"] > 0 and "held-out" in next(iter(report["per_text"]))


def test_stride_bos_and_divergence_on_some_windows(tiny, text, capsys):
    args = ["--window", "32", "--stride", "8", "--limit", "6", "--kl-windows", "2", "--add-bos", "--json"]
    assert main(["eval", str(tiny("llama")), "--baseline", str(tiny("llama")), "--text", text, *args]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tokens"] == 31 + 5 * 8 and report["kl_positions"] == 32 + 8
    assert report["protocol"]["bos"] is True and report["protocol"]["stride"] == 8


def test_tasks(tiny, tmp_path, capsys, monkeypatch):
    pytest.importorskip("lm_eval")
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"query": f"They went {i}, so", "choices": ["they ran.", "it fell."], "gold": i % 2} for i in range(5)]
    (tmp_path / "copa.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    command = ["eval", str(tiny("llama")), "--tasks", "copa", "--task-dir", str(tmp_path), "--limit", "3"]
    assert main([*command, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["tasks"]["copa"]) == {"acc", "acc_stderr", "documents"}
    assert report["tasks"]["copa"]["documents"] == 3 and report["perplexity"] is None
    assert main([*command, "--baseline", str(tiny("llama")), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tasks_baseline"] == report["tasks"] and report["kl_mean"] == 0


@pytest.mark.parametrize("args, words", [
    (["--text", "no/such.txt"], "no/such.txt: no such file"),
    (["--window", "1000"], "the model's context is 128"),
    (["--window", "16", "--stride", "17"], "--stride 17"),
    (["--dtype", "int4"], "--dtype int4"),
    (["--device", "cuda:77"], "--device cuda:77"),
    (["--tasks", "copa", "--task-dir", "no/such"], "--task-dir no/such"),
    (["--baseline", "./no/such"], "./no/such: no such directory"),
    (["--json", "no/such/report.json"], "there is no directory"),
])
def test_bad_input_is_one_line(args, words, tiny, capsys):
    assert main(["eval", str(tiny("llama")), "--limit", "1", *args]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: ") and words in err


def test_texts_that_cannot_be_scored(tiny, tmp_path, capsys):
    path = tmp_path / "t.txt"
    for content, words in (("", "is empty"), ("x", "at least 2"), ("  ", "is empty")):
        path.write_text(content)
        assert main(["eval", str(tiny("llama")), "--text", str(path)]) == 2
        assert words in capsys.readouterr().err

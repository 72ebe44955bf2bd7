"""``fewbits quantize`` as scripts use it: keys, exit codes, clean standard output, the quality gate."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits
from fewbits.cli.main import main
from fewbits.eval.divergence import divergence
from fewbits.quant.recipe import load_recipe
from fewbits.quant.source import open_source

torch.set_num_threads(1)

KEYS = {
    "seconds", "seconds_calibration", "seconds_quantization", "cpu_seconds", "peak_rss_bytes", "bits_per_weight",
    "bits_per_weight_total", "bytes", "predicted", "measured", "output",
}
"""What people read from scripts: more may come, none may go."""


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("".join(f"Line {i} of a text that says little, but says it {i * i} times. " for i in range(60)))
    return path


@pytest.fixture
def command(tiny, text, tmp_path):
    """``command(*more) -> arguments`` of a small run into ``tmp_path / "out"``."""
    small = ["--calib", str(text), "--samples", "6", "--seqlen", "32", "--threads", "1"]
    return lambda *more: ["quantize", str(tiny("llama")), "-o", str(tmp_path / "out"), *small, *more]


def quiet(err: str) -> str:
    return "".join(line for line in err.splitlines(True) if "Loading weights" not in line)


def recipe_of(out: Path) -> Any:
    return load_recipe(str(out / "recipe.toml"))


def test_json_alone_on_standard_output(command, tmp_path):
    """In a process of its own, so that nothing else writes either."""
    run = subprocess.run([sys.executable, "-m", "fewbits.cli.main", *command("--json")], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report.keys() >= KEYS
    for key in KEYS - {"predicted", "measured", "output"}:
        assert type(report[key]) in (int, float) and math.isfinite(report[key]) and report[key] > 0, key
    assert type(report["bytes"]) is int and type(report["peak_rss_bytes"]) is int
    assert report["measured"] is None and report["output"] == str(tmp_path / "out")
    assert report["bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert 4 < report["bits_per_weight"] < 4.6 < report["bits_per_weight_total"] < 32
    assert "Traceback" not in run.stderr and "wrote" in run.stderr and "bits per weight" in run.stderr


def test_report_to_a_file(command, tmp_path, capsys):
    assert main(command("--json", str(tmp_path / "report.json"), "--force")) == 0
    out, err = capsys.readouterr()
    assert out == "" and f"wrote {tmp_path / 'report.json'}" in err
    assert json.loads((tmp_path / "report.json").read_text()).keys() >= KEYS


def test_without_json_standard_output_is_empty(command, capsys):
    assert main(command("--recipe", "rtn")) == 0
    out, err = capsys.readouterr()
    assert out == "" and "wrote" in err and "MB" in err


def test_flags_reach_the_recipe_and_win_over_set(command, tmp_path, text):
    assert main(command("--recipe", "gptq", "--bits", "3", "--group-size", "16", "--dtype", "bfloat16", "--set",
                        "format.bits=8", "quantizer.damp=0.05", "format.symmetric=true", "keep=['*.o_proj']")) == 0
    recipe = recipe_of(tmp_path / "out")
    assert (recipe.format.bits, recipe.format.group_size, recipe.format.symmetric) == (3, 16, True)
    assert recipe.quantizer["damp"] == 0.05 and recipe.keep == ["*.o_proj"]
    want = recipe.calibration
    assert (want.sources, want.samples, want.seqlen, want.dtype) == ([str(text)], 6, 32, "bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["default"] == "int3_sym_g16" and config["quant_method"] == "fewbits"
    assert config["keep"] == sorted(["lm_head", *(f"model.layers.{i}.self_attn.o_proj" for i in (0, 1))])


@pytest.mark.parametrize("size, expected", [("auto", "int4_g64"), ("row", "int4_row"), ("32", "int4_g32")])
def test_group_size(size, expected, command, tmp_path):
    assert main(command("--recipe", "rtn", "--group-size", size)) == 0
    plan = {t["name"]: t["format"] for t in json.loads((tmp_path / "out" / "plan.json").read_text())["tensors"]}
    assert plan["model.layers.0.self_attn.q_proj"] == expected
    assert plan["model.layers.0.mlp.down_proj"] == ("int4_g32" if size == "auto" else expected)  # K = 96


def test_a_recipe_file(command, tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('lm_head = true\n[quantizer]\nname = "rtn"\n[format]\nbits = 5\n[[rules]]\nmatch = "*.q_proj"\n'
                    'format = "int2_row"\n')
    assert main(command("--recipe", str(path))) == 0
    recipe = recipe_of(tmp_path / "out")
    assert recipe.name == "mine" and recipe.lm_head and recipe.format.bits == 5
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["exceptions"]["model.layers.0.self_attn.q_proj"] == "int2_row" and config["keep"] == []


def test_the_recipe_of_a_checkpoint_makes_it_again(command, tmp_path, tiny):
    assert main(command("--bits", "3", "--set", "quantizer.damp=0.03")) == 0
    fewbits.quantize(tiny("llama"), tmp_path / "again", recipe=str(tmp_path / "out" / "recipe.toml"), threads=1)
    for shard in (tmp_path / "out").glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "again" / shard.name).read_bytes()


def test_several_texts_and_a_seed(command, tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text("Something else entirely. " * 100)
    assert main([*command("--seed", "3"), "--calib", str(other)]) == 0
    lock = json.loads((tmp_path / "out" / "fewbits.lock").read_text())
    assert lock["seed"] == 3 and lock["calibration"]["rows"] == 6
    drawn = [s.rpartition("/")[2] for s in lock["calibration"]["sources"]]
    assert drawn == ["calibration.txt: 3 rows", "other.txt: 3 rows"]


def test_stats_are_kept_and_reused(command, tmp_path, capsys):
    stats = tmp_path / "stats"
    assert main(command("--stats", str(stats), "--bits", "3")) == 0 and (stats / "stats.json").is_file()
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()}
    assert main(command("--stats", str(stats), "--bits", "3", "--force")) == 0
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").iterdir()} == first


def test_warnings_are_few_lines(command, capsys):
    assert main(command()) == 0
    lines = quiet(capsys.readouterr().err).splitlines()
    warnings = [line for line in lines if line.startswith("warning: ")]
    assert len(warnings) == 1 and "tokens per column" in warnings[0] and len(lines) == 2


# -- the gate -------------------------------------------------------------------------------------------------------


def worst_tensors(out: Path) -> list[str]:
    facts = json.loads((out / "plan.json").read_text())["tensors"]
    losses = {f["name"]: f["relative_loss"] for f in facts if "relative_loss" in f}
    return sorted(losses, key=losses.get, reverse=True)[:5]


@pytest.mark.parametrize("recipe", ["gptq", "rtn"])
def test_a_missed_gate_exits_3_and_says_where(recipe, command, tmp_path, capsys):
    assert main(command("--recipe", recipe, "--bits", "2", "--max-kl", "0.0001", "--json")) == 3
    out, err = capsys.readouterr()
    report = json.loads(out)
    assert report.keys() >= KEYS
    assert report["seconds"] > 0 and report["cpu_seconds"] > 0 and report["peak_rss_bytes"] > 0
    measured = report["measured"]
    assert measured["kl_mean"] > 0.0001 and measured["kl_stderr"] > 0
    last = quiet(err).splitlines()[-1]
    assert last.startswith("error: --max-kl: got ") and f"{measured['kl_mean']:.4f}" in last and "0.0001" in last
    worst = worst_tensors(tmp_path / "out")
    assert len(worst) == 5 and ", ".join(worst) in last
    fewbits.load(tmp_path / "out")  # it is written, for whoever wants to look


def test_a_missed_gate_still_writes_the_report_file(command, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(command("--recipe", "rtn", "--bits", "2", "--max-kl", "0", "--json", str(path))) == 3
    assert capsys.readouterr().out == "" and json.loads(path.read_text())["measured"]["kl_mean"] > 0


def test_a_generous_gate_passes_and_measures_what_eval_measures(command, tmp_path, tiny, text, capsys):
    """The measured divergence is that of the written checkpoint on rows that were not calibrated on."""
    assert main(command("--max-kl", "100", "--json")) == 0
    measured = json.loads(capsys.readouterr().out)["measured"]
    assert 0 < measured["kl_mean"] < 100

    from fewbits.calibration.data import load_calibration
    from fewbits.serving.transformers import load_tokenizer

    tokenizer = load_tokenizer(tiny("llama"))
    draw = [load_calibration([str(text)], tokenizer, samples=n, seqlen=32, seed=0).tokens for n in (6, 38)]
    used = {tuple(row) for row in draw[0].tolist()}
    held = [row for row in draw[1] if tuple(row.tolist()) not in used][:8]
    result = divergence(fewbits.load(tmp_path / "out"), fewbits.load(open_source(tiny("llama")).path), held)
    assert measured["kl_mean"] == pytest.approx(result.kl_mean, rel=1e-5)
    assert measured["kl_stderr"] == pytest.approx(result.kl_stderr, rel=1e-5)


def test_more_bits_measure_less(command, capsys):
    kl = []
    for bits in ("2", "4", "8"):
        assert main(command("--recipe", "rtn", "--bits", bits, "--max-kl", "1000", "--json", "--force")) == 0
        kl.append(json.loads(capsys.readouterr().out)["measured"]["kl_mean"])
    assert kl[0] > 3 * kl[1] > 9 * kl[2] >= 0

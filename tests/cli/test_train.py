"""``fewbits train`` on a tiny model: a ternary network that predicts more like the original than plain rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fewbits.cli.main import main
from fewbits.quant.inspection import inspect

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from pydoc_data.topics import topics

    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(topics[k] for k in sorted(topics))[:30_000], encoding="utf-8")
    return path


def words(model: Path, out: Path, text: Path, *more: str) -> list[str]:
    return ["train", str(model), "-o", str(out), "--recipe", "bitnet-finetune", "--text", str(text), "--steps", "40",
            "--seqlen", "32", "--samples", "64", "--lr", "0.02", *more,
            "--set", "calibration.dtype=float32", "calibration.samples=8", "refine.qat.checks=4"]


def test_training_turns_a_model_ternary(tiny, text, tmp_path, capsys):
    assert main(words(tiny("llama"), tmp_path / "out", text, "--json", str(tmp_path / "r.json"))) == 0
    (trained,) = json.loads((tmp_path / "r.json").read_text())["refined"]
    assert trained["helped"] and trained["after"] < 0.9 * trained["before"] and len(trained["curve"]) == 40
    formats = {t["format"] for t in inspect(tmp_path / "out").to_json()["tensors"] if t["name"].endswith("_proj")}
    assert formats == {"ternary_row_b3"}
    assert "KL to the original on held-out text" in capsys.readouterr().err
    pytest.importorskip("matplotlib")
    assert (tmp_path / "out" / "loss.png").stat().st_size > 5000


def test_the_same_bytes_twice(tiny, text, tmp_path):
    for out in ("a", "b"):
        assert main(words(tiny("llama"), tmp_path / out, text)) == 0
    for path in (tmp_path / "a").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_recipes_that_do_not_train_are_refused(tiny, text, tmp_path, capsys):
    asked = words(tiny("llama"), tmp_path / "out", text)
    asked[asked.index("bitnet-finetune")] = "gptq"
    assert main(asked[:asked.index("--steps")]) == 2
    assert "--recipe: got gptq, which trains nothing" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# -- several processes ------------------------------------------------------------------------------------------------


def launched(words: list[str], processes: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", "0",
               "--standalone", "-m", "fewbits.cli.main", *words]
    env = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.slow
def test_two_processes_train_one_model(tiny, text, tmp_path):
    """The first writes and reports; what comes of it is as good as what one process makes of the same rows."""
    assert main(words(tiny("llama"), tmp_path / "one", text, "--json", str(tmp_path / "one.json"))) == 0
    for out in ("two", "again"):
        run = launched(words(tiny("llama"), tmp_path / out, text, "--json", str(tmp_path / f"{out}.json")))
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("KL to the original on held-out text") == 1
    one, two = (json.loads((tmp_path / f"{n}.json").read_text())["refined"][0] for n in ("one", "two"))
    assert two["before"] == pytest.approx(one["before"], rel=1e-5) and len(two["curve"]) == 40
    assert two["after"] == pytest.approx(one["after"], rel=0.2) and two["after"] < 0.9 * two["before"]
    for path in (tmp_path / "two").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.slow
def test_a_batch_that_processes_cannot_share(tiny, text, tmp_path):
    run = launched([*words(tiny("llama"), tmp_path / "out", text), "refine.qat.batch=3"])
    assert run.returncode != 0
    assert "refine.qat.batch: got 3, needed a multiple of the 2 processes" in run.stderr

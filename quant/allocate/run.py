"""``plan`` and ``sweep``: budgets in, plans out; a sweep carries them out too, all from one calibration."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fewbits.calibration.stored import StoredStats
from fewbits.calibration.stream import StreamedModel
from fewbits.eval.models import choose_device
from fewbits.quant.allocate.planning import Plan, Planner, Progress
from fewbits.quant.checkpoint import INDEX, disk_errors, write_atomically
from fewbits.quant.errors import BudgetError, CheckpointError
from fewbits.quant.manifest import stats_identity
from fewbits.quant.pipeline import QuantizeReport, quantize
from fewbits.quant.prepare import load_text
from fewbits.quant.recipe import Budget, Recipe, load_recipe
from fewbits.quant.source import open_source, require_dense

_REPORT = "sweep.json"


def plan(
    model: str | Path,
    *,
    recipe: str | Recipe = "auto",
    overrides: Mapping[str, Any] | None = None,
    stats: str | Path | None = None,
    device: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    measured: Sequence[tuple[float, float]] = (),
    progress: Progress | None = None,
) -> Plan:
    """Decide the format of every tensor for the recipe's budget; writes no weights.

    Args:
        model: a Hugging Face id, a directory of safetensors, or a GGUF file.
        overrides: dotted recipe keys to change, e.g. ``{"budget.bpw": 3.1}``.
        stats: directory of calibration statistics, reused or kept.
        measured: ``(damage, measured KL)`` of earlier runs on this model, which sharpen the prediction.

    Raises:
        BudgetError: no budget, or one that cannot be met.
        FewbitsError: anything else that is wrong with the input.
    """
    started = time.monotonic()
    planner, chosen = prepare_planner(model, recipe, overrides, stats, device, threads, seed, progress)
    if not chosen.budget.given:
        raise BudgetError("plan: got no budget; give --bpw, --bpw-total, --size or --fits-in")
    made = planner.plan(chosen.budget, measured)
    made = replace(made, run=planner.estimate(made))
    made.seconds["total"] = time.monotonic() - started
    return made


def sweep(
    model: str | Path,
    out: str | Path,
    bpw: Sequence[float],
    *,
    recipe: str | Recipe = "auto",
    overrides: Mapping[str, Any] | None = None,
    device: str | None = None,
    threads: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """A checkpoint for every budget, its KL predicted and measured; one calibration serves all.

    Writes ``bpw-X/`` checkpoints, ``sweep.json`` and, where matplotlib is installed, ``sweep.png``. Budgets that an
    interrupted sweep of the same directory has finished are not made again.

    Raises:
        BudgetError: a budget cannot be met.
        CheckpointError: the directory holds a sweep of something else.
    """
    out = Path(out)
    for folder in (out, out / "stats"):
        with disk_errors(out):
            folder.mkdir(parents=True, exist_ok=True)
    settings = {**(overrides or {}), "calibration.inputs": "original", "calibration.true_sequential": False}
    planner, chosen = prepare_planner(model, recipe, settings, out / "stats", device, threads, seed, progress)
    for x in bpw:
        planner.require_reachable(Budget(bpw=x))
    rows = _known(out, chosen, model)
    for i, x in enumerate(bpw):
        points = [(r["damage"], r["measured"]["kl_mean"]) for r in rows if r["bpw"] != x]
        made = planner.plan(Budget(bpw=x), points)
        folder = out / f"bpw-{x:g}"
        row = next((r for r in rows if r["bpw"] == x), None)
        if row is None or not (folder / INDEX).exists():
            report = quantize(
                model, folder, recipe=made.recipe, stats=out / "stats", device=device, threads=threads, seed=seed,
                force=True, progress=progress,
            )
            rows = [r for r in rows if r["bpw"] != x] + [_row(x, made, report)]
            rows.sort(key=lambda r: r["bpw"])
            data = {"identity": _identity(chosen, model), "rows": rows}
            with disk_errors(out):
                write_atomically(out / _REPORT, json.dumps(data, indent=1) + "\n")
        if progress:
            progress("Sweeping", i + 1, len(bpw))
    _plot(rows, out / "sweep.png")
    return rows


def _row(x: float, made: Plan, report: QuantizeReport) -> dict[str, Any]:
    return {
        "bpw": x, "bits_per_weight": report.bits_per_weight, "bits_per_weight_total": report.bits_per_weight_total,
        "bytes": report.bytes, "damage": made.damage, "predicted": made.to_json()["predicted"],
        "measured": report.measured, "seconds": report.seconds,
    }


def _identity(recipe: Recipe, model: str | Path) -> dict[str, str]:
    return {"model": str(model), "recipe": recipe.fingerprint}


def _known(out: Path, recipe: Recipe, model: str | Path) -> list[dict[str, Any]]:
    if not (out / _REPORT).exists():
        return []
    data = json.loads((out / _REPORT).read_text())
    if data.get("identity") != _identity(recipe, model):
        raise CheckpointError(f"{out}: holds a sweep of another model or recipe; choose another directory")
    return data["rows"]


def prepare_planner(
    model: str | Path, recipe: str | Recipe, overrides: Mapping[str, Any] | None, stats: str | Path | None,
    device: str | None, threads: int | None, seed: int, progress: Progress | None,
) -> tuple[Planner, Recipe]:
    """The model opened and surveyed."""
    if threads:
        torch.set_num_threads(threads)
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe, overrides)
    source = open_source(model)
    require_dense(source)
    recipe = recipe.for_device(where := choose_device(device))
    streamed = StreamedModel(source, dtype=getattr(torch, recipe.calibration.dtype), device=where)
    planner = Planner(streamed, recipe, seed=seed, progress=progress)
    text = None
    if planner.needs_text:
        text, _ = load_text(recipe, streamed, seed, held_out=False)
    kept = StoredStats(Path(stats), stats_identity(source, recipe, text)) if stats and text else None
    planner.survey(text, kept)
    return planner, recipe


def _plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """KL against stored bits, predicted with its band and measured."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    bits = [r["bits_per_weight"] for r in rows]
    foreseen = [r["predicted"] for r in rows]
    if all(foreseen):
        axes.fill_between(
            bits, [p["band"][0] for p in foreseen], [p["band"][1] for p in foreseen], alpha=0.25, label="predicted"
        )
    axes.errorbar(
        bits, [r["measured"]["kl_mean"] for r in rows], yerr=[r["measured"]["kl_stderr"] or 0 for r in rows],
        marker="o", capsize=3, label="measured",
    )
    axes.set(xlabel="stored bits per weight", ylabel="KL to the original, nats per token", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)

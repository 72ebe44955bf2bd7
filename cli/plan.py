"""``fewbits plan``: what a budget buys, before anything is quantized."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.common import (
    STDOUT,
    DeviceOption,
    JsonOption,
    ModelArgument,
    ProgressBars,
    ThreadsOption,
    examples,
    report_to,
    say,
    show_table,
)
from fewbits.cli.options import (
    BatchOption,
    BpwOption,
    BpwTotalOption,
    CalibOption,
    CtxOption,
    FitsInOption,
    FormatsOption,
    ImagesOption,
    MeasuredOption,
    RecipeOption,
    SamplesOption,
    SeedOption,
    SeqlenOption,
    SettingsOption,
    SizeOption,
    StatsOption,
    TargetOption,
    budget_settings,
    predicted_and_measured,
    read_points,
    recipe_settings,
)

EPILOG = examples(
    "fewbits plan ./model --bpw 3.1",
    "fewbits plan ./model --size 90MB -o plan.json && fewbits quantize ./model -o out --plan plan.json",
    "fewbits plan ./model --fits-in 8GB --ctx 8192 --json",
    "fewbits plan ./model --bpw 4 --target vllm --stats ./stats",
)


def plan(
    model: ModelArgument,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", metavar="FILE", help="Write the plan here, for quantize --plan.")
    ] = None,
    bpw: BpwOption = None,
    bpw_total: BpwTotalOption = None,
    size: SizeOption = None,
    fits_in: FitsInOption = None,
    ctx: CtxOption = None,
    batch: BatchOption = None,
    formats: FormatsOption = None,
    target: TargetOption = None,
    recipe: RecipeOption = None,
    calib: CalibOption = None,
    images: ImagesOption = None,
    samples: SamplesOption = None,
    seqlen: SeqlenOption = None,
    stats: StatsOption = None,
    settings: SettingsOption = None,
    measured: MeasuredOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    json: JsonOption = None,
) -> None:
    """Choose a format for every tensor within a budget, and say what it will take and cost. Writes no weights."""
    with report_to(json) as report, ProgressBars() as progress:
        from fewbits.quant.allocate.run import plan as run

        overrides = recipe_settings(settings, calib=calib, samples=samples, seqlen=seqlen, images=images)
        budget = budget_settings(bpw=bpw, bpw_total=bpw_total, size=size, fits_in=fits_in, ctx=ctx, batch=batch,
                                 formats=formats, target=target)
        made = run(model, recipe=recipe or "auto", overrides=overrides | budget, stats=stats, device=device,
                   threads=threads, seed=seed, measured=read_points(measured), progress=progress)
        data = made.to_json()
        if out is not None:
            import json as jsonlib

            from fewbits.quant.checkpoint import disk_errors, write_atomically

            with disk_errors(out):
                write_atomically(out, jsonlib.dumps(data, indent=1) + "\n")
        report(data)
    show_table(_table(data))
    say(f"{made.bits_per_weight:.3f} bits per weight in the decoder blocks, {made.bits_per_weight_total:.3f} over all, "
        f"{made.bytes} bytes of weight files, planned in {made.seconds['total']:.0f} s")
    for warning in made.warnings:
        say(f"warning: {warning}")
    if made.footprint is not None:
        f = made.footprint
        say(f"memory: {f.total / 1e6:.1f} MB = weights {f.weights / 1e6:.1f} + KV cache {f.kv_cache / 1e6:.1f} + "
            f"activations {f.activations / 1e6:.1f}")
    if made.run is not None:
        say(f"quantizing with it will take about {made.run.seconds / 60:.1f} min and "
            f"{made.run.peak_memory / 1e9:.1f} GB of memory on this machine")
    if made.trust is not None:
        say(f"trust: {made.trust.damage} ranks {made.trust.tensors} tensors as their measured KL does with Spearman "
            f"{made.trust.rho:.2f}")
    if made.election is not None:
        say("measured KL of the plans that competed: "
            + ", ".join(f"{by} {kl:.4f}" for by, kl in sorted(made.election.items(), key=lambda item: item[1])))
    if data["predicted"]:
        say(predicted_and_measured(data["predicted"], None) + f" ({data['predicted']['basis']})")
    for path in (out, json):
        if path not in (None, STDOUT):
            say(f"wrote {path}")


def _table(data: dict[str, Any]) -> Any:
    """By the last part of the name: formats, and the mean bits."""
    from rich.table import Table

    rows: dict[str, list[dict[str, Any]]] = {}
    for t in data["tensors"]:
        if t["linear"]:
            rows.setdefault(t["name"].rpartition(".")[2], []).append(t)
    table = Table("linear", "bits per weight", "formats")
    for kind, tensors in rows.items():
        weights = sum(8 * t["bytes"] / t["bits_per_weight"] for t in tensors)
        bits = 8 * sum(t["bytes"] for t in tensors) / weights
        table.add_row(kind, f"{bits:.2f}", _formats(tensors))
    return table


def _formats(tensors: list[dict[str, Any]]) -> str:
    """How many tensors have each format; of those with several, how much of them has each."""
    from fewbits.quant.formats import parse_layout

    counts = Counter(t["format"] for t in tensors if "[" not in t["format"])
    mixed = [t for t in tensors if "[" in t["format"]]
    shares: Counter[str] = Counter()
    for t in mixed:
        for fmt, columns in parse_layout(t["format"], t["shape"][1]).runs:
            shares[fmt.name] += t["shape"][0] * columns
    parts = [f"{f} x {n}" for f, n in sorted(counts.items())]
    if mixed:
        inside = ", ".join(f"{f} {n / shares.total():.0%}" for f, n in sorted(shares.items()))
        parts.append(f"mixed x {len(mixed)}: {inside}")
    return ", ".join(parts)

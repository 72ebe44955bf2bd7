"""``fewbits sweep``: checkpoints for a range of budgets, predicted and measured, from one calibration."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.common import (
    DeviceOption,
    JsonOption,
    ModelArgument,
    ProgressBars,
    ThreadsOption,
    examples,
    report_to,
    say,
    say_reported,
    show_table,
)
from fewbits.cli.options import (
    CalibOption,
    FormatsOption,
    ImagesOption,
    RecipeOption,
    SamplesOption,
    SeedOption,
    SeqlenOption,
    SettingsOption,
    TargetOption,
    menu_settings,
    recipe_settings,
)

EPILOG = examples(
    "fewbits sweep ./model --bpw 2:5:0.25 -o sweep",
    "fewbits sweep ./model --bpw 2.5,3,4 -o sweep --formats int2,int3,int4,int8 --json",
)


def sweep(
    model: ModelArgument,
    bpw: Annotated[str, typer.Option("--bpw", metavar="LOW:HIGH:STEP", help="Budgets in bits per weight.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="Directory to write; a rerun goes on.")],
    formats: FormatsOption = None,
    target: TargetOption = None,
    recipe: RecipeOption = None,
    calib: CalibOption = None,
    images: ImagesOption = None,
    samples: SamplesOption = None,
    seqlen: SeqlenOption = None,
    settings: SettingsOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on in DIR (it does so anyway).")] = False,
    json: JsonOption = None,
) -> None:
    """Quantize for each budget of a range: a table, a plot, and KL predicted beside KL measured."""
    with report_to(json) as report, ProgressBars() as progress:
        from fewbits.quant.allocate.planning import parse_range
        from fewbits.quant.allocate.run import sweep as run

        overrides = recipe_settings(settings, calib=calib, samples=samples, seqlen=seqlen, images=images)
        rows = run(model, out, parse_range(bpw), recipe=recipe or "auto",
                   overrides=overrides | menu_settings(formats, target), device=device, threads=threads, seed=seed,
                   progress=progress)
        report({"rows": rows})
    from rich.table import Table

    table = Table("budget", "stored bits", "MB", "KL predicted", "band", "KL measured")
    for r in rows:
        p, m = r["predicted"], r["measured"]
        foreseen = (f"{p['kl_mean']:.4f}", f"{p['band'][0]:.4f} to {p['band'][1]:.4f}") if p else ("", "")
        table.add_row(f"{r['bpw']:g}", f"{r['bits_per_weight']:.3f}", f"{r['bytes'] / 1e6:.1f}", *foreseen,
                      f"{m['kl_mean']:.4f} +- {m['kl_stderr'] or 0:.4f}")
    show_table(table)
    say(f"wrote {out}")
    say_reported(json)

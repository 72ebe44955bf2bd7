"""``fewbits quantize``: a checkpoint in, a packed low-bit checkpoint out."""

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
)
from fewbits.cli.options import (
    BatchOption,
    BitsOption,
    BpwOption,
    BpwTotalOption,
    CalibOption,
    CtxOption,
    FitsInOption,
    ForceOption,
    FormatsOption,
    GroupSizeOption,
    ImagesOption,
    MeasuredOption,
    OutOption,
    RecipeOption,
    ResumeOption,
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
from fewbits.quant.errors import QualityGateError, RecipeError

EPILOG = examples(
    "fewbits quantize ./model -o ./model-w4",
    "fewbits quantize HuggingFaceTB/SmolLM2-135M -o out --recipe gptq --bits 3 --group-size 64",
    "fewbits quantize model.gguf -o out --calib notes.txt chats.jsonl --samples 256 --max-kl 0.15 --json report.json",
    "fewbits quantize ./model -o out --recipe best-2bit --effort fast",
    "fewbits quantize ./model -o out --bpw 3.1",
    "fewbits quantize ./model -o out --fits-in 8GB --ctx 8192",
    "fewbits quantize ./model -o out --set quantizer.damp=0.05 calibration.skip_tokens=1",
)


def quantize(
    model: ModelArgument,
    out: OutOption,
    recipe: RecipeOption = None,
    bits: BitsOption = None,
    group_size: GroupSizeOption = None,
    calib: CalibOption = None,
    images: ImagesOption = None,
    samples: SamplesOption = None,
    seqlen: SeqlenOption = None,
    stats: StatsOption = None,
    settings: SettingsOption = None,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="T", help="Of the calibration passes: float32, bfloat16, auto.")
    ] = None,
    threads: ThreadsOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    force: ForceOption = False,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", metavar="X", help="Exit 3 if KL on held-out text exceeds X nats.")
    ] = None,
    bpw: BpwOption = None,
    bpw_total: BpwTotalOption = None,
    size: SizeOption = None,
    fits_in: FitsInOption = None,
    ctx: CtxOption = None,
    batch: BatchOption = None,
    formats: FormatsOption = None,
    target: TargetOption = None,
    plan: Annotated[
        Path | None, typer.Option("--plan", metavar="FILE", help="Carry out a plan that 'fewbits plan' wrote.")
    ] = None,
    measured: MeasuredOption = None,
    effort: Annotated[str | None, typer.Option(
        "--effort", metavar="E", help="What the recipe's refiners may spend: fast, normal or best.")] = None,
    json: JsonOption = None,
) -> None:
    """Quantize a model and write a checkpoint that transformers loads (after ``import fewbits``)."""
    budget = budget_settings(bpw=bpw, bpw_total=bpw_total, size=size, fits_in=fits_in, ctx=ctx, batch=batch,
                             formats=formats, target=target)
    if plan is not None and budget.keys() - {"allocate.target"}:
        raise RecipeError("--plan: got a budget or menu beside it; a plan has spent its own, leave one of them out")
    name = recipe or ("auto" if budget.keys() - {"allocate.target"} else "gptq")
    with report_to(json) as report, ProgressBars() as progress:
        from fewbits.quant.pipeline import quantize as run

        overrides = recipe_settings(settings, bits=bits, group_size=group_size, calib=calib, samples=samples,
                               seqlen=seqlen, dtype=dtype, images=images)
        try:
            result = run(
                model, out, recipe=name, overrides=overrides | budget, plan=plan, measured=read_points(measured),
                stats=stats, device=device, threads=threads, seed=seed, resume=resume, force=force, max_kl=max_kl,
                effort=effort, progress=progress, announce=say,
            )
        except QualityGateError as missed:
            report(missed.report.to_json())
            raise
        report(result.to_json())
    for refined in result.refined:
        say(f"{refined['refiner']}: {refined['before']:.4f} to {refined['after']:.4f} on held-out text, in "
            f"{refined['seconds']:.0f} s")
    for warning in result.warnings:
        say(f"warning: {warning}")
    say(
        f"wrote {out}: {result.bits_per_weight:.2f} bits per weight in the decoder blocks, "
        f"{result.bits_per_weight_total:.2f} over all, {result.bytes / 1e6:.1f} MB, in {result.seconds:.0f} s"
    )
    if result.predicted or result.measured:
        say(predicted_and_measured(result.predicted, result.measured))
    say_reported(json)

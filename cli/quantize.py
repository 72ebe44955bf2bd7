"""``fewbits quantize``: a checkpoint in, a packed low-bit checkpoint out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.cli.common import (
    STDOUT,
    DeviceOption,
    JsonOption,
    ProgressBars,
    ThreadsOption,
    examples,
    not_built,
    report_to,
    say,
)
from fewbits.quant.errors import QualityGateError, RecipeError

EPILOG = examples(
    "fewbits quantize ./model -o ./model-w4",
    "fewbits quantize HuggingFaceTB/SmolLM2-135M -o out --recipe gptq --bits 3 --group-size 64",
    "fewbits quantize model.gguf -o out --calib notes.txt chats.jsonl --samples 256 --max-kl 0.15 --json report.json",
    "fewbits quantize ./model -o out --set quantizer.damp=0.05 calibration.skip_tokens=1",
)
_LATER = "Not built yet: refused."


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a directory, or a GGUF file.")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Directory to write.")],
    recipe: Annotated[
        str, typer.Option("--recipe", metavar="NAME|FILE", help="A shipped recipe, or a TOML file.")
    ] = "gptq",
    bits: Annotated[int | None, typer.Option("--bits", metavar="B", help="Bits of a code, 1 to 8.")] = None,
    group_size: Annotated[
        str | None, typer.Option("--group-size", metavar="G|auto|row", help="Columns that share a scale.")
    ] = None,
    calib: Annotated[
        list[str] | None,
        typer.Option("--calib", metavar="SRC ...", help="Text or JSONL files, hf:NAME, self, or default."),
    ] = None,
    samples: Annotated[int | None, typer.Option("--samples", metavar="N", help="Calibration rows.")] = None,
    seqlen: Annotated[int | None, typer.Option("--seqlen", metavar="L", help="Tokens per row.")] = None,
    stats: Annotated[
        Path | None, typer.Option("--stats", metavar="DIR", help="Keep statistics here, or reuse those that are.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE ...", help="Any recipe key, e.g. quantizer.damp.")
    ] = None,
    device: DeviceOption = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", metavar="T", help="Of the calibration passes: float32, bfloat16, auto.")
    ] = None,
    threads: ThreadsOption = None,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Of everything that draws.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in OUT.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what an earlier run left in OUT.")] = False,
    max_kl: Annotated[
        float | None, typer.Option("--max-kl", metavar="X", help="Exit 3 if KL on held-out text exceeds X nats.")
    ] = None,
    bpw: Annotated[str | None, typer.Option("--bpw", metavar="X", help=_LATER)] = None,
    bpw_total: Annotated[str | None, typer.Option("--bpw-total", metavar="X", help=_LATER)] = None,
    size: Annotated[str | None, typer.Option("--size", metavar="90MB", help=_LATER)] = None,
    fits_in: Annotated[str | None, typer.Option("--fits-in", metavar="8GB", help=_LATER)] = None,
    ctx: Annotated[str | None, typer.Option("--ctx", metavar="N", help=_LATER)] = None,
    batch: Annotated[str | None, typer.Option("--batch", metavar="N", help=_LATER)] = None,
    formats: Annotated[str | None, typer.Option("--formats", metavar="A,B", help=_LATER)] = None,
    plan: Annotated[str | None, typer.Option("--plan", metavar="FILE", help=_LATER)] = None,
    target: Annotated[str, typer.Option("--target", metavar="T", help="Engine: fewbits; others later.")] = "fewbits",
    effort: Annotated[str | None, typer.Option("--effort", metavar="E", help=_LATER)] = None,
    json: JsonOption = None,
) -> None:
    """Quantize a model and write a checkpoint that transformers loads (after ``import fewbits``)."""
    later = {
        "--bpw": bpw, "--bpw-total": bpw_total, "--size": size, "--fits-in": fits_in, "--ctx": ctx, "--batch": batch,
        "--formats": formats, "--plan": plan, "--effort": effort,
        f"--target {target}": None if target == "fewbits" else target,
    }
    for flag, value in later.items():
        if value is not None:
            raise not_built(flag)
    with report_to(json) as report, ProgressBars() as progress:
        from fewbits.quant.pipeline import quantize as run

        overrides = _overrides(settings, bits=bits, group_size=group_size, calib=calib, samples=samples,
                               seqlen=seqlen, dtype=dtype)
        try:
            result = run(
                model, out, recipe=recipe, overrides=overrides, stats=stats, device=device, threads=threads,
                seed=seed, resume=resume, force=force, max_kl=max_kl, progress=progress,
            )
        except QualityGateError as missed:
            report(missed.report.to_json())
            raise
        report(result.to_json())
    for warning in result.warnings:
        say(f"warning: {warning}")
    say(
        f"wrote {out}: {result.bits_per_weight:.2f} bits per weight in the decoder blocks, "
        f"{result.bits_per_weight_total:.2f} over all, {result.bytes / 1e6:.1f} MB, in {result.seconds:.0f} s"
    )
    if json not in (None, STDOUT):
        say(f"wrote {json}")


def _overrides(
    settings: list[str] | None, *, bits: int | None, group_size: str | None, calib: list[str] | None,
    samples: int | None, seqlen: int | None, dtype: str | None,
) -> dict[str, Any]:
    """Recipe keys that the flags set; flags win over ``--set``."""
    from fewbits.quant.recipe import parse_settings

    group: int | str | None = group_size
    if group_size is not None and group_size not in ("auto", "row"):
        if not group_size.isdecimal():
            raise RecipeError(f"--group-size: got {group_size!r}, needed a number, auto or row")
        group = int(group_size)
    flags = {
        "format.bits": bits, "format.group_size": group, "calibration.sources": calib, "calibration.samples": samples,
        "calibration.seqlen": seqlen, "calibration.dtype": dtype,
    }
    return parse_settings(settings or []) | {k: v for k, v in flags.items() if v is not None}

"""Options of every command that quantizes or plans to, and what they mean as recipe keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fewbits.quant.errors import BudgetError, RecipeError

RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", metavar="NAME|FILE", help="A shipped recipe or a TOML file (gptq; auto with a budget)."),
]
BitsOption = Annotated[
    float | None, typer.Option("--bits", metavar="B", help="Bits of a code, 1 to 8; trellis codes 1 to 4, also 2.5.")
]
GroupSizeOption = Annotated[
    str | None, typer.Option("--group-size", metavar="G|auto|row", help="Columns that share a scale.")
]
CalibOption = Annotated[
    list[str] | None,
    typer.Option("--calib", metavar="SRC ...", help="Text or JSONL files, hf:NAME, self, or default."),
]
ImagesOption = Annotated[
    str | None,
    typer.Option("--images", metavar="DIR|JSONL", help="Images with text to calibrate on, for models that take them."),
]
SamplesOption = Annotated[int | None, typer.Option("--samples", metavar="N", help="Calibration rows.")]
SeqlenOption = Annotated[int | None, typer.Option("--seqlen", metavar="L", help="Tokens per row.")]
StatsOption = Annotated[
    Path | None, typer.Option("--stats", metavar="DIR", help="Keep statistics here, or reuse those that are.")
]
SettingsOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE ...", help="Any recipe key, e.g. quantizer.damp.")
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="S", help="Of everything that draws.")]
OutOption = Annotated[Path, typer.Option("-o", "--out", metavar="OUT", help="Directory to write.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the interrupted run in OUT.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite what an earlier run left in OUT.")]
BpwOption = Annotated[
    float | None, typer.Option("--bpw", metavar="X", help="Budget: bits per weight over the linears of the blocks.")
]
BpwTotalOption = Annotated[
    float | None, typer.Option("--bpw-total", metavar="X", help="Budget: bits per weight over everything stored.")
]
SizeOption = Annotated[str | None, typer.Option("--size", metavar="90MB", help="Budget: bytes of the weight files.")]
FitsInOption = Annotated[
    str | None, typer.Option("--fits-in", metavar="8GB", help="Budget: memory for weights, KV cache and activations.")
]
CtxOption = Annotated[int | None, typer.Option("--ctx", metavar="N", min=1, help="Context that --fits-in counts.")]
BatchOption = Annotated[int | None, typer.Option("--batch", metavar="N", min=1, help="Batch that --fits-in counts.")]
FormatsOption = Annotated[
    str | None, typer.Option("--formats", metavar="A,B,...", help="Formats to choose from, e.g. int2,int3_g64,int4.")
]
TargetOption = Annotated[
    str | None,
    typer.Option("--target", metavar="T", help="Engine that limits the formats: fewbits, vllm, sglang, transformers, "
                 "llama.cpp."),
]
MeasuredOption = Annotated[
    list[Path] | None,
    typer.Option("--measured", metavar="FILE ...", help="JSON reports of earlier runs, which sharpen the prediction."),
]


def recipe_settings(
    settings: list[str] | None, *, calib: list[str] | None, samples: int | None, seqlen: int | None,
    bits: float | None = None, group_size: str | None = None, dtype: str | None = None, images: str | None = None,
) -> dict[str, Any]:
    """Recipe keys that the flags set; flags win over ``--set``."""
    from fewbits.quant.recipe import parse_settings

    group: int | str | None = group_size
    if group_size is not None and group_size not in ("auto", "row"):
        if not group_size.isdecimal():
            raise RecipeError(f"--group-size: got {group_size!r}, needed a number, auto or row")
        group = int(group_size)
    flags = {
        "format.bits": int(bits) if bits and bits % 1 == 0 else bits,
        "format.group_size": group, "calibration.sources": calib, "calibration.samples": samples,
        "calibration.seqlen": seqlen, "calibration.dtype": dtype, "calibration.images": images,
    }
    return parse_settings(settings or []) | {k: v for k, v in flags.items() if v is not None}


def budget_settings(
    *, bpw: float | None, bpw_total: float | None, size: str | None, fits_in: str | None, ctx: int | None,
    batch: int | None, formats: str | None, target: str | None,
) -> dict[str, Any]:
    """Recipe keys that the flags of a budget set; empty where there is none.

    Raises:
        BudgetError: more than one budget, or flags that need one.
    """
    from fewbits.quant.allocate.budget import parse_size

    given = {
        "bpw": bpw, "bpw_total": bpw_total, "size": None if size is None else parse_size(size),
        "fits_in": None if fits_in is None else parse_size(fits_in, "--fits-in"),
    }
    flags = ["--" + k.replace("_", "-") for k, v in given.items() if v is not None]
    if len(flags) > 1:
        raise BudgetError(f"{flags[0]}: got {flags[1]} beside it, needed one budget; leave one of them out")
    for key in ("bpw", "bpw_total"):
        if given[key] is not None and not 0 < given[key] < 64:  # type: ignore[operator]
            raise BudgetError(f"--{key.replace('_', '-')}: got {given[key]}, needed bits per weight, e.g. 3.1")
    for flag, value in (("--ctx", ctx), ("--batch", batch)):
        if value is not None and fits_in is None:
            raise BudgetError(f"{flag}: got no --fits-in, which is what it is for; give one or leave it out")
    if formats is not None and not flags:
        raise BudgetError("--formats: got no budget to spend on them; give --bpw, --size or --fits-in, "
                          "or name one format by --bits and --group-size")
    keys = {f"budget.{k}": v for k, v in {**given, "ctx": ctx, "batch": batch}.items()}
    return {k: v for k, v in keys.items() if v is not None} | menu_settings(formats, target)


def menu_settings(formats: str | None, target: str | None) -> dict[str, Any]:
    """Recipe keys that ``--formats`` and ``--target`` set."""
    keys = {
        "allocate.formats": None if formats is None else [f for f in formats.replace(" ", "").split(",") if f],
        "allocate.target": target,
    }
    return {k: v for k, v in keys.items() if v is not None}


def read_points(reports: list[Path] | None) -> list[tuple[float, float]]:
    """``(damage, measured KL)`` of each JSON report of an earlier ``quantize`` with a budget, or of a sweep.

    Raises:
        RecipeError: a file is no such report.
    """
    points = []
    for path in reports or []:
        try:
            data = json.loads(path.read_text())
            for row in data.get("rows", [data]):
                points.append((float(row["predicted"]["damage"]), float(row["measured"]["kl_mean"])))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"--measured {path}: is not the report of a run with a budget ({type(error).__name__}); "
                              "give what quantize --json or sweep wrote") from error
    return points


def predicted_and_measured(predicted: Mapping[str, Any] | None, measured: Mapping[str, Any] | None) -> str:
    """One line: KL foreseen with its band, and KL found."""
    parts = []
    if predicted:
        low, high = predicted["band"]
        parts.append(f"predicted {predicted['kl_mean']:.4f} ({low:.4f} to {high:.4f})")
    if measured:
        error = f" +- {measured['kl_stderr']:.4f}" if measured["kl_stderr"] is not None else ""
        inside = {True: ", in the band", False: ", outside the band"}.get(measured.get("in_band", ""), "")
        parts.append(f"measured {measured['kl_mean']:.4f}{error}{inside}")
    return "KL to the original, nats per token: " + "; ".join(parts)

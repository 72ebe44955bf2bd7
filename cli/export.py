"""``fewbits export``: the same integers in the layout of another engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.common import JsonOption, ProgressBars, examples, report_to, say, say_reported

EPILOG = examples(
    "fewbits export ./model-w4 --to compressed-tensors -o ./model-w4-ct",
    "fewbits export ./model-w4 --to gptq -o ./model-w4-gptq",
    "fewbits export ./model-w4 --to gguf -o ./model-w4.gguf",
    "fewbits export ./model-w3 --to compressed-tensors --allow odd-bits -o ./model-w3-ct",
    "fewbits export ./model-mxfp4 --to compressed-tensors -o ./model-mxfp4-ct",
    "fewbits export ./ternary --to bitnet -o ./ternary-bitnet",
    "fewbits export ./model-w2 --to dense -o ./model-w2-bf16",
)


def export(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A fewbits checkpoint.")],
    to: Annotated[str, typer.Option("--to", metavar="T", help="compressed-tensors, gptq, bitnet, gguf or dense.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder, or file, to write.")],
    allow: Annotated[
        list[str] | None,
        typer.Option("--allow", metavar="WHAT", help="Take what not every engine reads, or not every tensor fits: "
                                                     "asymmetric, odd-bits, dense-experts, nvfp4-experts, ternary "
                                                     "(gguf). Can be given again."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    json: JsonOption = None,
) -> None:
    """Write a fewbits checkpoint in the layout of another engine, without rounding again."""
    with report_to(json) as report, ProgressBars() as progress:
        from fewbits.serving.export import export as run

        result = run(directory, output, to=to, allow=allow or [], force=force, progress=progress)
        report(result.to_json())
    for warning in result.warnings:
        say(f"warning: {warning}")
    say(f"{result.tensors} quantized tensors, {result.bytes / 1e6:.1f} MB in {result.output}")
    say_reported(json)

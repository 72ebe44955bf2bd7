"""``fewbits inspect``: what is in a checkpoint, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.common import STDOUT, JsonOption, examples, report_to, say_reported, show_table

EPILOG = examples("fewbits inspect ./model-w4", "fewbits inspect ./model-w4 --json")


def inspect(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A fewbits checkpoint.")],
    json: JsonOption = None,
) -> None:
    """Show stored bits, formats, losses and provenance of a fewbits checkpoint."""
    with report_to(json) as report:
        from fewbits.quant.inspection import inspect as run

        result = run(directory)
        report(result.to_json())
    if json != STDOUT:
        show_table(result.to_table())
    say_reported(json)

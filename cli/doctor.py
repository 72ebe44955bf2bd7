"""``fewbits doctor``: which engines read a checkpoint, and what to change where one does not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.common import STDOUT, JsonOption, examples, report_to, say, say_reported, show_table

EPILOG = examples("fewbits doctor ./model-w4", "fewbits doctor ./model-w4 --json")


def doctor(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A fewbits checkpoint.")],
    json: JsonOption = None,
) -> None:
    """Say which engines read a checkpoint, with which kernel, on how many GPUs, and what to change."""
    with report_to(json) as report:
        from fewbits.serving.doctor import diagnose

        result = diagnose(directory)
        report(result.to_json())
    if json != STDOUT:
        show_table(result.to_table())
        for trap in result.traps:
            say(f"mind: {trap}")
    say_reported(json)

"""``fewbits card``: write the model card again, with what was measured since."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.common import examples, say

EPILOG = examples("fewbits eval ./model-w4 --baseline ./model --json eval.json",
                  "fewbits card ./model-w4 --eval eval.json")


def card(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A fewbits checkpoint.")],
    evaluated: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE", help="The JSON report of fewbits eval.")
    ] = None,
) -> None:
    """Write README.md of a checkpoint: stored bits, recipe, how to load, and what was measured."""
    from fewbits.quant.card import CARD, write_card
    from fewbits.quant.shards import read_json

    write_card(directory, directory, evaluated=read_json(evaluated) if evaluated else None)
    say(f"wrote {directory / CARD}")

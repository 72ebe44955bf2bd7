"""``fewbits recipes``: the recipes that come with fewbits."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fewbits.cli.common import examples

EPILOG = examples("fewbits recipes", "fewbits recipes gptq > mine.toml")


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this recipe's TOML.")] = None,
) -> None:
    """List the recipes, or print one."""
    from fewbits.quant.recipe import load_recipe, recipe_names, recipe_text

    if name is not None:
        print(recipe_text(name), end="")
    elif not sys.stdout.isatty():
        print("\n".join(recipe_names()))
    else:
        for each in recipe_names():
            print(f"{each:12} {load_recipe(each).description}")

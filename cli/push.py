"""``fewbits push``: a checkpoint to the Hugging Face hub, after a question."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.common import examples, say
from fewbits.quant.errors import RecipeError

EPILOG = examples("fewbits push ./model-w4 me/model-w4", "fewbits push ./model-w4 me/model-w4 --private --yes")


def push(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of fewbits, or an export.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository on the hub, e.g. me/model-w4.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private, if it is new.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Upload a checkpoint to the Hugging Face hub; shows what, and asks first."""
    from fewbits.serving.push import prepare
    from fewbits.serving.push import push as run

    upload = prepare(directory, repo)
    for path in upload.files:
        say(f"  {path.name}  {path.stat().st_size / 1e6:.1f} MB")
    where = f"{repo}, {'private' if private else 'public'} if it is new"
    say(f"{len(upload.files)} files, {upload.bytes / 1e6:.1f} MB, to {where}")
    if not yes:
        if not sys.stdin.isatty():
            raise RecipeError("push: nobody is there to ask; --yes uploads without a question")
        if not typer.confirm("Upload?", err=True):
            say("nothing was uploaded")
            return
    print(run(upload, private=private))

"""``fewbits serve``: an OpenAI-compatible endpoint by an installed engine."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from fewbits.cli.common import DeviceOption, examples, say

EPILOG = examples(
    "fewbits serve ./model-w4",
    "fewbits serve ./model-w4 --port 9000 --engine transformers",
    "fewbits serve ./model-w4 --print",
    "fewbits serve ./model-w4 --engine vllm -- --tensor-parallel-size 2",
)


def serve(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint of fewbits, or an export.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[-- ARG ...]", help="Arguments for the engine, after --.")
    ] = None,
    port: Annotated[int, typer.Option("--port", metavar="P", min=1, max=65535, help="Where to listen.")] = 8000,
    host: Annotated[str, typer.Option("--host", metavar="H", help="Address; 0.0.0.0 for all.")] = "127.0.0.1",
    engine: Annotated[
        str | None, typer.Option("--engine", metavar="E", help="vllm or transformers; default: vllm if installed.")
    ] = None,
    device: DeviceOption = None,
    print_: Annotated[bool, typer.Option("--print", help="Show the command and do not run it.")] = False,
) -> None:
    """Serve a checkpoint over HTTP, as OpenAI's API has it, until Ctrl-C."""
    from fewbits.serving.serve import example_request, require_free_port, serve_command

    command = serve_command(directory, engine=engine, host=host, port=port, device=device, more=more or [])
    if print_:
        print(shlex.join(command))
        return
    require_free_port(host, port)
    say(f"$ {shlex.join(command)}")
    say(f"when it is up: {example_request(host, port, directory.resolve().name)}")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], command)  # signals and the exit code are the engine's own

"""The ``fewbits`` command: registers the subcommands and turns errors into exit codes.

Exit codes: 0 done, 1 a bug of ours (with its traceback), 2 the user's input (one line), 3 a quality gate was missed,
130 interrupted.
"""

from __future__ import annotations

import errno
import importlib
import inspect
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from fewbits import __version__
from fewbits.cli.common import Command, say
from fewbits.quant.errors import FewbitsError, QualityGateError

COMMANDS = {
    "quantize": "fewbits.cli.quantize:quantize",
    "plan": "fewbits.cli.plan:plan",
    "train": "fewbits.cli.train:train",
    "sweep": "fewbits.cli.sweep:sweep",
    "eval": "fewbits.cli.eval:evaluate",
    "generate": "fewbits.cli.generate:generate",
    "bench": "fewbits.cli.bench:bench",
    "inspect": "fewbits.cli.inspect:inspect",
    "export": "fewbits.cli.export:export",
    "doctor": "fewbits.cli.doctor:doctor",
    "serve": "fewbits.cli.serve:serve",
    "card": "fewbits.cli.card:card",
    "push": "fewbits.cli.push:push",
    "recipes": "fewbits.cli.recipes:recipes",
}
"""Subcommand -> module and function. The modules import nothing heavy at their top, so that ``--help`` is quick; the
function may have an ``EPILOG`` beside it, shown at the end of its help."""

_USERS_ERRNO = {
    errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
    errno.ENAMETOOLONG, errno.EFBIG,
}

app = typer.Typer(
    name="fewbits", rich_markup_mode="rich", pretty_exceptions_enable=False, add_completion=False,
    help="Low-bit weights for large language models: quantize a checkpoint, measure it, run it.",
    epilog="MODEL is a hub id, a directory, or a GGUF file. Reports are for scripts with --json.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fewbits {__version__}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        typer.echo(ctx.get_help())


def _function(target: str) -> tuple[Any, str | None]:
    """The function that ``module:function`` names, and its module's EPILOG."""
    module_name, _, name = target.partition(":")
    module = importlib.import_module(module_name)
    return getattr(module, name), getattr(module, "EPILOG", None)


for _name, _target in COMMANDS.items():
    _callback, _epilog = _function(_target)
    app.command(_name, cls=Command, epilog=_epilog)(_callback)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code; ``argv`` without the program's name."""
    args = list(sys.argv[1:] if argv is None else argv)
    _quiet_libraries()
    try:
        status = app(args, standalone_mode=False, prog_name="fewbits")
        sys.stdout.flush()
    except (BrokenPipeError, SystemExit):  # typer exits by itself when the reader of standard output went away
        # without this Python complains once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        return 128 + 13
    except KeyboardInterrupt:
        status = 130
    except QualityGateError as e:
        return _fail(e, 3)
    except FewbitsError as e:
        return _fail(e, 2)
    except MemoryError as e:
        return _fail(f"out of memory ({e}); use a smaller model or window", 2)
    except OSError as e:
        if e.errno not in _USERS_ERRNO:
            return _bug()
        return _fail(f"{e.filename or 'a file'}: {e.strerror}; check the path, its permissions and the free space", 2)
    except typer.Abort:
        status = 130
    except Exception as e:  # the last resort: every other exception is a bug, shown whole
        # usage errors share no public base class: click's own in older releases of typer, a private one in newer
        if hasattr(e, "format_message"):
            return _fail(f"{e.format_message()} (see {_help_of(args)})", 2)
        return _bug()
    if status == 130:
        say("interrupted" + ("; run again with --resume" if _resumes(args) else ""))
    return status if isinstance(status, int) else 0


def _fail(error: Exception | str, code: int) -> int:
    say("error: " + " ".join(str(error).split()))
    return code


def _bug() -> int:
    traceback.print_exc()
    return 1


def _help_of(args: Sequence[str]) -> str:
    return f"fewbits {args[0]} --help" if args and args[0] in COMMANDS else "fewbits --help"


def _resumes(args: Sequence[str]) -> bool:
    """Whether the command that was run knows ``--resume``."""
    if not args or args[0] not in COMMANDS:
        return False
    return "resume" in inspect.signature(_function(COMMANDS[args[0]])[0]).parameters


def _quiet_libraries() -> None:
    """No chatter of other libraries between our lines; their progress bars only on a terminal. Changes no number."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        if "transformers" in sys.modules:  # it has read the variables above already
            sys.modules["transformers"].logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())

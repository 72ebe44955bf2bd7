"""What the commands share: options, where output goes, progress, and arguments that typer alone cannot read."""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from fewbits.quant.errors import FewbitsError

STDOUT = "-"

JsonOption = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write the report as JSON to FILE, or alone: to standard output."),
]
ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A hub id, a directory, or a GGUF file.")]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="D", help="Where to compute: cpu, cuda, cuda:1; default: a GPU if any."),
]
DtypeOption = Annotated[
    str | None,
    typer.Option("--dtype", metavar="T", help="float32 (default on CPU), bfloat16, float16, or auto: as stored."),
]
ThreadsOption = Annotated[int | None, typer.Option("--threads", metavar="N", min=1, help="CPU threads.")]


def examples(*lines: str) -> str:
    """An epilog of example commands, one a line in the help."""
    return "\n\n".join(["Examples:", *lines])


def say(text: str) -> None:
    """Prose for people, on standard error."""
    print(text, file=sys.stderr)


def show_table(table: Any) -> None:
    """A rich table, on standard error; as wide as it needs to be when that is not a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 200
    console.print(table)


# -- output --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def report_to(target: str | None) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Give a function that writes a report as JSON to where ``--json`` says, and keep standard output for it alone.

    Whatever else is printed inside (by libraries too) goes to standard error. ``target`` is checked at once, so that
    hours of work are not lost to a typo. Raises FewbitsError when it cannot be written.
    """
    out = sys.stdout
    if target not in (None, STDOUT):
        _check_writable(Path(target).expanduser())

    def report(value: dict[str, Any]) -> None:
        if target is None:
            return
        text = jsonlib.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        if target == STDOUT:
            out.write(text)
            out.flush()
        else:
            _write_whole(Path(target).expanduser(), text)

    with contextlib.redirect_stdout(sys.stderr):
        yield report


def say_reported(target: str | None) -> None:
    """Tell where the report went, if it went to a file."""
    if target not in (None, STDOUT):
        say(f"wrote {target}")


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise FewbitsError(f"--json {path}: is a directory; name a file")
    if not path.parent.is_dir():
        raise FewbitsError(f"--json {path}: there is no directory {path.parent}; create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise FewbitsError(f"--json {path}: cannot be written; choose another place")


def _write_whole(path: Path, text: str) -> None:
    """Write beside it first and rename, so that nobody reads half a report; a device or pipe is written directly."""
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # through a link, not over it
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with open(handle, "w", encoding="utf-8") as f:
            f.write(text)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(name, 0o666 & ~mask)  # temporary files are private; a report is not
        os.replace(name, path)
    except OSError:
        os.unlink(name)
        raise


# -- progress ------------------------------------------------------------------------------------------------------


class ProgressBars:
    """``with ProgressBars() as progress: work(progress=progress)``; ``progress(what, done, total)``.

    Bars with the time left, on standard error, and only when that is a terminal.
    """

    def __init__(self) -> None:
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> ProgressBars:
        if sys.stderr.isatty():
            from rich import progress as rich_progress
            from rich.console import Console

            self._bars = rich_progress.Progress(
                rich_progress.TextColumn("{task.description}"), rich_progress.BarColumn(),
                rich_progress.MofNCompleteColumn(), rich_progress.TimeElapsedColumn(),
                rich_progress.TextColumn("left"), rich_progress.TimeRemainingColumn(),
                console=Console(stderr=True), transient=True,
            )
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` units of ``what`` are finished; a count that starts anew restarts its bar."""
        if self._bars is None:
            return
        task, before = self._tasks.get(what, (None, done))
        if task is None or done <= before:
            if task is not None:
                self._bars.remove_task(task)
            task = self._bars.add_task(what, total=total)
        self._tasks[what] = task, done
        self._bars.update(task, completed=done, total=total)


# -- arguments -----------------------------------------------------------------------------------------------------


def not_built(flag: str) -> FewbitsError:
    """For a documented flag whose work is still to come: refused, never ignored."""
    return FewbitsError(f"{flag}: is not built yet; leave it out")


class Command(TyperCommand):
    """A command that also reads ``--json`` without a value and ``--text A B C``, in any place."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, expand_arguments(args, self.params))


def expand_arguments(args: Sequence[str], params: Sequence[Any]) -> list[str]:
    """Rewrite arguments so that each option that takes a value has exactly one.

    A repeatable option (``--text A B``) takes the words that follow it, and ``--json`` the one that follows, if there
    is one. But no word is taken that a required argument still lacks: ``--json MODEL`` reports to standard output, and
    ``--text A MODEL`` is one text. ``--`` ends it all. Everything else, errors too, is left to the parser.
    """
    options = {name: p for p in params if p.param_type_name == "option" for name in (*p.opts, *p.secondary_opts)}
    needed = sum(p.nargs if p.nargs > 0 else 1 for p in params if p.param_type_name == "argument" and p.required)
    tokens: list[tuple[str | None, list[str]]] = []  # (option or None, words); an option's words beyond need are spare
    rest = list(args)
    while rest:
        word = rest.pop(0)
        option = options.get(word)
        if word == "--":
            tokens.append((None, [word, *rest]))
            break
        if option is None or option.is_flag or getattr(option, "count", False):
            tokens.append((None, [word]))
            continue
        own: list[str] = []
        if option.multiple or word == "--json":
            while rest and not (rest[0].startswith("-") and rest[0] != STDOUT) and (option.multiple or not own):
                own.append(rest.pop(0))
        elif rest:
            own.append(rest.pop(0))
        tokens.append((word, own))
    return _settle(tokens, options, needed)


def _settle(tokens: list[tuple[str | None, list[str]]], options: dict[str, Any], needed: int) -> list[str]:
    """Give back the spare words that required arguments need, last ones first, and write the options out."""
    given = 0
    for option, words in tokens:
        if option is None:
            given += len(words) - 1 if words[0] == "--" else not (words[0].startswith("-") and words[0] != STDOUT)
    out: list[str] = []
    for option, words in reversed(tokens):
        back: list[str] = []
        least = 0 if option == "--json" else 1
        while option and (option == "--json" or options[option].multiple) and given < needed and len(words) > least:
            back.insert(0, words.pop())
            given += 1
        out[:0] = [*_written(option, words), *back]
    return out


def _written(option: str | None, words: list[str]) -> list[str]:
    if option is None:
        return words
    if not words:
        return [f"{option}={STDOUT}"] if option == "--json" else [option]
    return [part for word in words for part in ([f"{option}={word}"] if option[:2] == "--" else [option, word])]

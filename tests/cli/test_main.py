"""Exit codes, one-line errors, clean standard output, arguments in any order."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fewbits import __version__
from fewbits.cli import common
from fewbits.cli import main as main_module
from fewbits.cli.common import ProgressBars, expand_arguments, not_built, report_to
from fewbits.cli.main import main
from fewbits.quant.errors import FewbitsError, ModelError, QualityGateError


def param(*opts, kind="option", flag=False, multiple=False, required=False):
    return SimpleNamespace(param_type_name=kind, opts=opts, secondary_opts=(), is_flag=flag, multiple=multiple,
                           required=required, nargs=1, count=False)


PARAMS = [
    param("model", kind="argument", required=True), param("--json"), param("--text", multiple=True),
    param("--window"), param("--out", "-o"), param("--force", flag=True),
]


@pytest.mark.parametrize("given, expected", [
    ("M --json", "M --json=-"),
    ("M --json f", "M --json=f"),
    ("M --json -", "M --json=-"),
    ("M --json=f", "M --json=f"),
    ("--json M", "--json=- M"),
    ("--json f M", "--json=f M"),
    ("M --json --window 3", "M --json=- --window=3"),
    ("M --text a b --json", "M --text=a --text=b --json=-"),
    ("M --text a --text b", "M --text=a --text=b"),
    ("--text a M", "--text=a M"),
    ("--text a b M", "--text=a --text=b M"),
    ("--text a --force M", "--text=a --force M"),
    ("--window -3 M", "--window=-3 M"),
    ("-o out M", "-o out M"),
    ("M -oout --json", "M -oout --json=-"),
    ("M extra --json f", "M extra --json=f"),
    ("--json f -- M", "--json=f -- M"),
    ("--text a -- -M", "--text=a -- -M"),
    ("M --text", "M --text"),
    ("M --window", "M --window"),
    ("M --unknown x", "M --unknown x"),
])
def test_arguments(given, expected):
    assert expand_arguments(given.split(), PARAMS) == expected.split()


def test_help_is_quick_and_loads_nothing_heavy():
    code = "import sys; from fewbits.cli.main import main; s = main(['--help']); " \
           "print(s, [m for m in ('torch', 'transformers', 'lm_eval') if m in sys.modules], file=sys.stderr)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stderr.strip() == "0 []"
    assert all(name in run.stdout for name in main_module.COMMANDS)


@pytest.mark.parametrize("command", sorted(main_module.COMMANDS))
def test_help_of_each_command_has_examples(command, capsys):
    assert main([command, "--help"]) == 0
    out = capsys.readouterr().out
    assert "Examples" in out and f"fewbits {command}" in out


def test_version_and_no_arguments(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fewbits {__version__}\n"
    assert main([]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize("args, words", [
    (["evil"], "did you mean 'eval'"), (["eval"], "missing argument 'model'"),
    (["eval", "m", "--widow", "3"], "--widow"), (["eval", "m", "--window", "wide"], "--window"),
    (["eval", "m", "n"], "unexpected"), (["--bogus"], "--bogus"),
    (["eval", "m", "--limit", "0"], "--limit"), (["eval", "m", "--window"], "--window"),
])
def test_usage_errors_are_one_line(args, words, capsys):
    assert main(args) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1
    assert words in err.lower()


@pytest.mark.parametrize("error, code, words", [
    (ModelError("m: broken\nhere; fix it"), 2, "error: m: broken here; fix it\n"),
    (QualityGateError("--max-kl: got 3"), 3, "error: --max-kl: got 3\n"),
    (OSError(errno.ENOSPC, "No space left on device", "out/x"), 2, "out/x: No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "/x"), 2, "/x: Permission denied"),
    (MemoryError("big"), 2, "out of memory"),
    (OSError(errno.EIO, "Input/output error"), 1, "Traceback"),
    (RuntimeError("a bug"), 1, "Traceback"),
    (ValueError("a bug"), 1, "Traceback"),
    (KeyboardInterrupt(), 130, "interrupted\n"),
])
def test_exit_codes(error, code, words, capsys, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("fewbits.eval.report.evaluate", fail)
    assert main(["eval", "m"]) == code
    out, err = capsys.readouterr()
    assert out == "" and words in err


def test_interrupted_names_resume_where_the_command_has_it(capsys, monkeypatch):
    def fail(model, resume=False):
        raise AssertionError

    monkeypatch.setattr(main_module, "_function", lambda target: (fail, None))
    monkeypatch.setattr("fewbits.eval.report.evaluate", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["eval", "m"]) == 130
    assert capsys.readouterr().err == "interrupted; run again with --resume\n"


def test_reports_are_alone_on_standard_output(tmp_path, capsys):
    with report_to("-") as report:
        print("chatter of a library")
        report({"a": 1.5})
    out, err = capsys.readouterr()
    assert json.loads(out) == {"a": 1.5} and err == "chatter of a library\n"
    path = tmp_path / "r.json"
    with report_to(str(path)) as report:
        report({"a": "ä"})
        report({"a": "é"})
    assert json.loads(path.read_text()) == {"a": "é"} and path.stat().st_mode & 0o077 == 0o077 & ~umask() & 0o066
    assert os.listdir(tmp_path) == ["r.json"]
    with report_to(None) as report:
        report({"a": 1})
    assert capsys.readouterr().out == ""


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_places_that_cannot_take_a_report(tmp_path):
    for target, words in ((tmp_path, "is a directory"), (tmp_path / "none" / "x", "there is no directory")):
        with pytest.raises(FewbitsError, match=words), report_to(str(target)):
            raise AssertionError("too late")


def test_a_reader_that_goes_away_is_no_bug():
    command = f"'{sys.executable}' -m fewbits.cli.main --help; echo $? >&2"
    run = subprocess.run(["bash", "-c", f"({command}) | true"], capture_output=True, text=True)
    assert "Traceback" not in run.stderr and run.stderr.strip() in ("0", "141")


def test_not_built_is_refused():
    assert "--port: is not built yet" in str(not_built("--port"))


def test_progress_bars(monkeypatch, capsys):
    with ProgressBars() as progress:
        progress("Working", 1, 2)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(common.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with ProgressBars() as progress:
        for done in (1, 2, 1, 2):
            progress("Working", done, 2)
        progress("More", 1, 1)
        assert [(t.description, t.completed) for t in progress._bars.tasks] == [("Working", 2), ("More", 1)]
    assert capsys.readouterr().out == ""

"""``fewbits recipes``: names for scripts, TOML that loads, and every shipped recipe in order."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fewbits.cli.main import main
from fewbits.quant.recipe import load_recipe, parse_recipe, recipe_names, tomllib


def test_one_name_a_line_when_piped():
    run = subprocess.run([sys.executable, "-m", "fewbits.cli.main", "recipes"], capture_output=True, text=True)
    assert run.returncode == 0 and run.stderr == ""
    names = run.stdout.splitlines()
    assert names == sorted(names) == recipe_names() and {"gptq", "rtn"} <= set(names)
    assert run.stdout.endswith("\n") and all(n == n.strip() and " " not in n for n in names)


def test_names_with_descriptions_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == recipe_names()
    assert all(load_recipe(line.split()[0]).description in line for line in lines)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_toml_that_loads(name, capsys, tmp_path):
    assert main(["recipes", name]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith("#"), "a recipe starts with what it reproduces"
    data = tomllib.loads(out)
    assert data["name"] == name and data["description"]
    path = tmp_path / "mine.toml"  # as a user changes one: recipes NAME > mine.toml
    path.write_text(out)
    assert load_recipe(str(path)) == load_recipe(name)
    full = load_recipe(name).to_toml()
    assert parse_recipe(tomllib.loads(full)) == load_recipe(name)


@pytest.mark.parametrize("name, words", [("gtpq", "did you mean 'gptq'?"), ("nothing.toml", "no file nothing.toml"),
                                         ("", "recipe")])
def test_unknown_recipes(name, words, capsys):
    assert main(["recipes", name]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and words in err and err.count("\n") == 1


def test_a_file_that_is_no_toml(tmp_path, capsys):
    path = tmp_path / "bad.toml"
    for content in (b"a = ", b"\xff\xfe"):
        path.write_bytes(content)
        assert main(["quantize", "model", "-o", str(tmp_path / "out"), "--recipe", str(path)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ") and "not TOML" in err and err.count("\n") == 1

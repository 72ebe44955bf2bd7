"""What is shipped: a wheel made from the sdist holds every file of the packages, and runs outside of the repository."""

from __future__ import annotations

import itertools
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("calibration", "cli", "configs", "eval", "kernels", "quant", "serving")
SHIPPED = {".py", ".toml", ".yaml", ".c", ".safetensors"}

BUILD = "import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"

USE = """
import importlib, sys
from pathlib import Path
import fewbits
here = Path(sys.argv[1])
assert here in Path(fewbits.__file__).parents, fewbits.__file__
for name in sys.argv[2].split():
    module = importlib.import_module(name)
    assert module.__file__ is None or here in Path(module.__file__).parents, module.__file__
from fewbits.quant.recipe import load_recipe, recipe_names
assert all(load_recipe(name) for name in recipe_names()) and recipe_names()
from fewbits.kernels.cpu import build
assert all(build.source(name).is_file() for name in build.LIBRARIES)
"""


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env or None, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def package_files() -> set[str]:
    """Paths in a wheel of everything that the packages consist of."""
    found = {"fewbits/__init__.py", "fewbits/_autoload.py", "fewbits/py.typed"}
    for package in PACKAGES:
        found |= {f"fewbits/{p.relative_to(ROOT)}" for p in (ROOT / package).rglob("*") if p.suffix in SHIPPED}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from the sdist, built from a copy of the sources."""
    copy, dist = tmp_path_factory.mktemp("tree") / "fewbits", tmp_path_factory.mktemp("dist")
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", *PACKAGES):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=ignore)
    run(sys.executable, "-c", BUILD.format(kind="sdist"), dist, cwd=copy)
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(dist, filter="data")
    run(sys.executable, "-c", BUILD.format(kind="wheel"), dist, cwd=dist / sdist.name.removesuffix(".tar.gz"))
    (built,) = dist.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_every_file(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not n.endswith("/")}
    inside = {n for n in names if ".dist-info/" not in n}
    assert inside == package_files()
    assert any(n.endswith("licenses/LICENSE") for n in names)


@pytest.mark.slow
def test_wheel_runs_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    modules = {
        ".".join(Path(name).with_suffix("").parts).removesuffix(".__init__") for name in package_files()
        if name.endswith(".py") and "triton" not in name and not name.endswith(("/aot.py", "/vllm_method.py"))
    }
    run(sys.executable, "-c", USE, target, " ".join(sorted(modules)), cwd=tmp_path, PYTHONPATH=str(target))
    version = run(sys.executable, "-m", "fewbits.cli.main", "--version", cwd=tmp_path, PYTHONPATH=str(target))
    assert version.startswith("fewbits ")
    script = (target / "bin" / "fewbits").read_text()
    assert "from fewbits.cli.main import main" in script


def test_packages_are_linked_into_the_source_tree() -> None:
    """Every top-level package is reached through ``src/fewbits``, by a relative link, so that it is shipped."""
    for package in PACKAGES:
        link = ROOT / "src" / "fewbits" / package
        assert link.is_symlink() and not link.readlink().is_absolute() and link.resolve() == ROOT / package
    importable = {p.parent.name for p in ROOT.glob("*/__init__.py")} | {"kernels"}
    assert importable == set(PACKAGES)
    assert not (ROOT / "tests" / "__init__.py").exists()


def test_constraints_name_every_requirement() -> None:
    """``constraints.txt`` pins each direct requirement at a version that ``pyproject.toml`` allows."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    tomllib = pytest.importorskip("tomllib")  # Python 3.11, from which on the constraints hold
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    pinned = {canonicalize_name(name): version for name, version in pins.items()}
    for text in itertools.chain(project["dependencies"], *project["optional-dependencies"].values()):
        requirement = Requirement(text)
        name = canonicalize_name(requirement.name)
        if name != "fewbits" and (requirement.marker is None or requirement.marker.evaluate()):
            assert requirement.specifier.contains(pinned[name]), text

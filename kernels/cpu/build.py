"""Compile the C kernel with the system's compiler at first use and load it.

The library is cached per user under a name made from the source, the compiler and the CPU, so a new version, another
compiler or a home directory shared by different machines never loads the wrong one. It is written to a temporary file
and renamed, so processes that start together cannot see a half-written one.

Torch ships ``libgomp.so.1`` under that very SONAME and loads it first; the library is linked to the same name, so both
run on one pool of threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

log = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("int_matmul.c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-Wno-psabi")
# Tried in order until one compiles: clang without libomp has no -fopenmp, some targets have no -march=native.
VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
COMPILE_SECONDS = 120

_LONG, _INT, _POINTER = ctypes.c_long, ctypes.c_int, ctypes.c_void_p
SIGNATURES = {
    "fewbits_gemv": [_POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _INT, _INT],
    "fewbits_dequantize": [_POINTER, _POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _INT],
}


@lru_cache(maxsize=1)
def load() -> ctypes.CDLL | None:
    """The compiled library, or None (with one logged warning that says what to install) when there is no compiler."""
    compiler = find_compiler()
    if compiler is None:
        log.warning("no C compiler found (tried %s): quantized layers run in plain torch, several times slower; "
                    "install one, e.g. `apt install gcc`", ", ".join(COMPILERS))
        return None
    path = build(compiler, cache_dir())
    if path is None:
        log.warning("%s could not compile %s: quantized layers run in plain torch, several times slower; "
                    "install a recent gcc or clang", compiler, SOURCE.name)
        return None
    library = ctypes.CDLL(str(path))
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, ctypes.c_int
    return library


def find_compiler() -> str | None:
    return next((path for name in COMPILERS if (path := shutil.which(name))), None)


def cache_dir() -> Path:
    """A directory that only this user writes to: the usual cache, or a fresh temporary one where there is no home."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "fewbits"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="fewbits-"))
    return path if os.access(path, os.W_OK) else Path(tempfile.mkdtemp(prefix="fewbits-"))


def build(compiler: str, directory: Path) -> Path | None:
    """Path of the library in ``directory``, compiled if it is not there; None when every variant of flags fails."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS).stdout
    key = "\0".join([SOURCE.read_text(), repr((FLAGS, VARIANTS)), compiler, version, cpu_flags()])
    target = directory / f"int_matmul-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    for variant in VARIANTS:
        handle, temporary = tempfile.mkstemp(dir=directory, suffix=".so")
        os.close(handle)
        done = subprocess.run([compiler, *FLAGS, *variant, str(SOURCE), "-o", temporary],
                              capture_output=True, text=True, timeout=COMPILE_SECONDS)
        if done.returncode == 0:
            os.replace(temporary, target)
            return target
        os.unlink(temporary)
        log.debug("%s %s: %s", compiler, " ".join(variant), done.stderr)
    return None


def cpu_flags() -> str:
    """What ``-march=native`` depends on: the instruction sets of this CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(dict.fromkeys(line for line in lines if line.startswith(wanted)))

"""Compile the C kernels with the system's compiler at first use and load them.

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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-shared", "-Wno-psabi")
# Tried in order until one compiles: clang without libomp has no -fopenmp, some targets have no -march=native.
VARIANTS = (("-march=native", "-fopenmp"), ("-mcpu=native", "-fopenmp"), ("-march=native",), ())
COMPILE_SECONDS = 120

_LONG, _INT, _FLOAT, _POINTER = ctypes.c_long, ctypes.c_int, ctypes.c_float, ctypes.c_void_p


@dataclass(frozen=True)
class Library:
    """One C file.

    Attributes:
        slower: what runs in plain torch without it, for the warning.
        signatures: its functions, with the types of their arguments.
        flags: of the compiler, beyond those of all.
    """

    slower: str
    signatures: Mapping[str, list[Any]]
    flags: tuple[str, ...] = ()


LIBRARIES = {
    "int_matmul": Library("quantized layers run in plain torch, several times slower", {
        "fewbits_gemv": [_POINTER, _POINTER, _POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _INT,
                         _INT],
        "fewbits_dequantize": [_POINTER, _POINTER, _INT, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _INT],
    }),
    # The search is to make the very choices of its counterpart in torch, where products are rounded before sums.
    "viterbi": Library("trellis codes are searched for in plain torch, many times slower", {
        "fewbits_viterbi": [_POINTER, _POINTER, _POINTER, _LONG, _INT, _INT, _INT],
    }, flags=("-ffp-contract=off",)),
    "beam": Library("residual vector codes are searched for in plain torch, many times slower", {
        "fewbits_beam": [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _INT, _LONG, _LONG, _INT, _INT],
    }),
    "pyramid": Library("pyramid vectors are searched for in plain torch, many times slower", {
        "fewbits_pyramid": [_POINTER, _POINTER, _LONG, _INT, _INT],
    }),
    "grid_loss": Library("scales of tables are searched for in plain torch, many times slower", {
        "fewbits_grid_loss": [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG,
                              _INT],
    }),
    "divergence": Library("the loss of refiners is computed in plain torch, several times slower", {
        "fewbits_divergence": [_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT, _INT],
    }),
    "trellis_matmul": Library("layers of trellis codes run in plain torch, many times slower", {
        "fewbits_trellis_gemv": [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _INT, _FLOAT, _INT],
        "fewbits_trellis_dequantize": [_POINTER, _POINTER, _LONG, _LONG, _INT, _INT, _FLOAT, _INT],
    }),
    "vector_matmul": Library("layers of vector codes run in plain torch, several times slower", {
        "fewbits_vector_gemv": [_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT, _INT, _LONG, _INT,
                                _INT],
        "fewbits_vector_dequantize": [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT, _INT, _LONG, _INT, _INT],
    }, flags=("-ffp-contract=off",)),  # whether sums are contracted would depend on the number of tokens
    "row_vector_matmul": Library("layers of product codes run in plain torch, several times slower", {
        "fewbits_row_gemv": [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _LONG, _INT,
                             _INT, _INT],
        "fewbits_row_dequantize": [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _LONG, _INT, _INT, _INT],
    }, flags=("-ffp-contract=off",)),
    "group_matmul": Library("layers of few levels and of tables run in plain torch, several times slower", {
        "fewbits_group_gemv": [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _FLOAT, _INT, _POINTER, _LONG, _LONG,
                               _LONG, _LONG, _LONG, _LONG, _INT, _INT],
        "fewbits_group_dequantize": [_POINTER, _POINTER, _POINTER, _POINTER, _FLOAT, _INT, _POINTER, _LONG, _LONG,
                                     _LONG, _LONG, _INT, _INT],
    }),
    "pvq_matmul": Library("layers of pyramid vectors run in plain torch, several times slower", {
        "fewbits_pvq_gemv": [_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _INT],
        "fewbits_pvq_dequantize": [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _INT],
    }, flags=("-ffp-contract=off",)),
}
"""Name of a C file in this folder -> what it holds."""


@cache
def load(name: str) -> ctypes.CDLL | None:
    """A compiled library, or None (with one logged warning that says what to install) when there is no compiler."""
    library = LIBRARIES[name]
    compiler = find_compiler()
    if compiler is None:
        log.warning("no C compiler found (tried %s): %s; install one, e.g. `apt install gcc`", ", ".join(COMPILERS),
                    library.slower)
        return None
    path = build(name, compiler, cache_dir())
    if path is None:
        log.warning("%s could not compile %s: %s; install a recent gcc or clang", compiler, source(name).name,
                    library.slower)
        return None
    loaded = ctypes.CDLL(str(path))
    for function, types in library.signatures.items():
        getattr(loaded, function).argtypes, getattr(loaded, function).restype = types, ctypes.c_int
    return loaded


def source(name: str) -> Path:
    return Path(__file__).with_name(f"{name}.c")


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


def build(name: str, compiler: str, directory: Path) -> Path | None:
    """Path of the library in ``directory``, compiled if it is not there; None when every variant of flags fails."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS).stdout
    flags = (*FLAGS, *LIBRARIES[name].flags)
    key = "\0".join([source(name).read_text(), repr((flags, VARIANTS)), compiler, version, cpu_flags()])
    target = directory / f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if target.exists():
        return target
    for variant in VARIANTS:
        handle, temporary = tempfile.mkstemp(dir=directory, suffix=".so")
        os.close(handle)
        done = subprocess.run([compiler, *flags, *variant, str(source(name)), "-o", temporary],
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

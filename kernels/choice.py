"""What the tables of kernels share: Triton, which is optional, at its first use, and the choice by number of tokens."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeVar

from torch import Tensor

TRITON_GEMV_TOKENS = 2
"""Its work grows with every token: 5 instructions a weight each, where the gemm takes 10 for 16 tokens
(benchmarks/aot.py)."""


class _Limited(Protocol):
    @property
    def max_tokens(self) -> int | None: ...


K = TypeVar("K", bound=_Limited)


def pick(candidates: Iterable[tuple[str, K]], tokens: int) -> tuple[str, K]:
    """The first that takes so many tokens; the last candidate takes any number."""
    return next(c for c in candidates if c[1].max_tokens is None or tokens <= c[1].max_tokens)


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def from_triton(module: str, name: str) -> Callable[..., Tensor]:
    """The function ``name`` of ``kernels/<module>.py``, imported at its first call."""
    found: Any = None

    def run(*args: Any) -> Tensor:
        nonlocal found
        if found is None:
            found = getattr(importlib.import_module(f"fewbits.kernels.{module}"), name)
        return found(*args)

    return run

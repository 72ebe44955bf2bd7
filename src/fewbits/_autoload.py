"""Registers fewbits with transformers: at once if it is imported already, else right after it is. Imports neither."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

TARGET = "transformers.quantizers.auto"


class _Hook(importlib.abc.MetaPathFinder):
    """Runs the registration after the module that holds transformers' tables, once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != TARGET:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _register() -> None:
    # The module registers itself at its end. No name is taken from it: if its own import of transformers is what
    # brought us here, it is only half made.
    importlib.import_module("fewbits.serving.transformers")


def enable() -> None:
    """Register now or when transformers is imported; any number of times."""
    if TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _Hook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Hook())

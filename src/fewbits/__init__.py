"""fewbits: low-bit weights for large language models.

The front door. Importing it is cheap (no torch until a function is used), and it teaches transformers to load
fewbits checkpoints: at once if transformers is already imported, else at the moment it is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fewbits._autoload import enable as _enable

__version__ = "0.1.0"

_LAZY = {
    "quantize": "fewbits.quant.pipeline",
    "plan": "fewbits.quant.allocate.run",
    "sweep": "fewbits.quant.allocate.run",
    "load": "fewbits.serving.transformers",
    "export": "fewbits.serving.export",
    "evaluate": "fewbits.eval.report",
    "bench": "fewbits.eval.bench",
    "Recipe": "fewbits.quant.recipe",
    "FewbitsError": "fewbits.quant.errors",
}

__all__ = ["FewbitsError", "Recipe", "__version__", "bench", "evaluate", "export", "load", "plan", "quantize", "sweep"]

if TYPE_CHECKING:
    from fewbits.eval.bench import bench
    from fewbits.eval.report import evaluate
    from fewbits.quant.allocate.run import plan, sweep
    from fewbits.quant.errors import FewbitsError
    from fewbits.quant.pipeline import quantize
    from fewbits.quant.recipe import Recipe
    from fewbits.serving.export import export
    from fewbits.serving.transformers import load


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'fewbits' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


_enable()

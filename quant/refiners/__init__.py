"""The registry of refiners: what tunes a quantized model without changing its formats. One file and one line each."""

from __future__ import annotations

from fewbits.quant.refiners.distill import EFFORTS, Distill, Effort
from fewbits.quant.refiners.norms import Norms
from fewbits.quant.refiners.pv import PV

Refiner = Distill

REFINERS: dict[str, type[Refiner]] = {
    "norms": Norms,
    "distill": Distill,
    "pv": PV,
}
"""Name of the recipe's table ``[refine.NAME]`` -> frozen dataclass whose fields are its keys."""

__all__ = ["EFFORTS", "REFINERS", "Effort", "Refiner"]

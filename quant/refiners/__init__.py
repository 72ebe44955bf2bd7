"""The registry of refiners: what tunes a quantized model without changing its formats. One file and one line each."""

from __future__ import annotations

from fewbits.quant.refiners.block import BlockRefiner
from fewbits.quant.refiners.codebook import Codebook
from fewbits.quant.refiners.distill import Distill
from fewbits.quant.refiners.effort import EFFORTS, Effort
from fewbits.quant.refiners.gumbel import Gumbel
from fewbits.quant.refiners.norms import Norms
from fewbits.quant.refiners.pv import PV
from fewbits.quant.refiners.qat import QAT
from fewbits.quant.refiners.signround import SignRound

Refiner = BlockRefiner | Distill

REFINERS: dict[str, type[Refiner]] = {
    "signround": SignRound,
    "gumbel": Gumbel,
    "codebook": Codebook,
    "norms": Norms,
    "distill": Distill,
    "pv": PV,
    "qat": QAT,
}
"""Name of the recipe's table ``[refine.NAME]`` -> frozen dataclass whose fields are its keys."""

__all__ = ["EFFORTS", "REFINERS", "Effort", "Refiner"]

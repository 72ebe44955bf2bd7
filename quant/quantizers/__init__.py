"""The registry of quantizers: one file and one line each."""

from __future__ import annotations

from fewbits.quant.quantizers.bitnet import BitNet
from fewbits.quant.quantizers.gptq import GPTQ
from fewbits.quant.quantizers.rtn import RTN

QUANTIZERS: dict[str, type[RTN] | type[GPTQ] | type[BitNet]] = {
    "rtn": RTN,
    "gptq": GPTQ,
    "bitnet": BitNet,
}
"""Recipe name -> frozen dataclass whose fields are the options of the recipe's ``[quantizer]`` table."""

"""transformers' own BitNet layout: ternary weights with one scale a matrix, multiplied by activations of 8 bits.

``weight (N / 4, K)`` uint8 holds four rows, a quarter of the matrix apart, in the four pairs of bits of each byte: bits
``2i`` and ``2i + 1`` of row ``r`` are row ``r + i * N / 4``, as value + 1. ``weight_scale (1,)`` is one over the scale.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fewbits.quant.errors import FormatError
from fewbits.quant.targets import Target
from fewbits.quant.types import Layout, QuantizedTensor
from fewbits.serving.export.base import Progress, dense_linears, linear_format, packed, write_folder
from fewbits.serving.export.stored import Stored

_ELSEWHERE = "add it to keep, or export to compressed-tensors"
_ROWS_PER_BYTE = 4


class BitNet:
    """Takes weights that were trained to be ternary; rounding others to three values makes nothing of use."""

    single_file = False

    def obstacle(self, target: Target, layout: Layout) -> str | None:
        fmt = linear_format(target, layout)
        if isinstance(fmt, str):
            return fmt
        if target.kind == "expert":
            return f"has no experts; {_ELSEWHERE}"
        if fmt.code_bits != 2 or not fmt.symmetric:
            return f"takes ternary weights, as ternary_row or int2_sym_row or in groups; got {fmt.name}; {_ELSEWHERE}"
        if target.shape[0] % _ROWS_PER_BYTE:
            return f"packs rows by {_ROWS_PER_BYTE}, got N = {target.shape[0]}; {_ELSEWHERE}"
        return None

    def write(self, stored: Stored, out: Path, progress: Progress) -> list[str]:
        config = {
            "quant_method": "bitnet", "linear_class": "bitlinear", "quantization_mode": "offline",
            "modules_to_not_convert": dense_linears(stored),
        }
        write_folder(stored, out, config, packed(stored, bitnet_tensors), progress)
        return ["activations: this layout rounds the input of each linear to 8 bits a token, which fewbits does not; "
                "measure what is served"]


def bitnet_tensors(name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """``weight`` and ``weight_scale`` of a matrix.

    Raises:
        FormatError: a value is none of -1, 0 and 1, or the groups differ in scale.
    """
    (segment,) = tensor.segments
    scale = segment.params["scale"].float()
    codes = segment.codes.view(*scale.shape, -1)  # (N, G, columns of a group); 2 stands for 0
    if bool((codes == 0).any()):
        share = float((codes == 0).float().mean())
        raise FormatError(f"{name}: bitnet takes the values -1, 0 and 1, got -2 in {share:.1%} of the weights; "
                          f"{_ELSEWHERE}")
    used = scale[(codes != 2).any(-1)]  # the scale of a group of zeros says nothing
    if used.numel() and float(used.min()) != float(used.max()):
        raise FormatError(f"{name}: bitnet takes one scale a matrix, got {float(used.min()):.6g} to "
                          f"{float(used.max()):.6g}; {_ELSEWHERE}")
    one = used[:1] if used.numel() else torch.ones(1)
    quarters = (segment.codes - 1).view(_ROWS_PER_BYTE, -1, tensor.shape[1])
    packed = quarters[0] | quarters[1] << 2 | quarters[2] << 4 | quarters[3] << 6
    return {"weight": packed, "weight_scale": 1 / one}

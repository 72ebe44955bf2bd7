"""compressed-tensors ``pack-quantized``: what vLLM, SGLang and transformers read without fewbits.

Codes, scales and zero points are stored as this format has them already, so files are renamed and not repacked. Each
format becomes one config group that lists its modules by exact name: engines match groups in the order of their keys,
which a ``save_pretrained`` sorts, and disjoint names are the same in any order.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.targets import Target
from fewbits.quant.types import Layout
from fewbits.serving.export.base import Progress, dense_linears, group_of, one_integer_format, write_folder
from fewbits.serving.export.names import hub_matrices
from fewbits.serving.export.stored import Stored

_EVERYWHERE = (2, 4, 8)


@dataclass(frozen=True)
class CompressedTensors:
    """Attributes:
    odd_bits: take 3, 5, 6 and 7 bits: compressed-tensors packs them without gaps from 0.18 on, and with gaps before,
        and nothing in the files says which.
    asymmetric: take zero points, which transformers cannot load with compressed-tensors 0.18 to 0.20.
    """

    odd_bits: bool = False
    asymmetric: bool = False

    single_file = False

    def obstacle(self, target: Target, layout: Layout) -> str | None:
        fmt = one_integer_format(layout)
        if isinstance(fmt, str):
            return fmt
        if target.kind == "embedding":
            return "has no packed embeddings that every engine reads; quantize without --set embeddings=true"
        if target.kind == "conv1d":
            return "has no transposed linears (transformers' Conv1D); use the checkpoint with fewbits"
        group = "row" if fmt.group_size is None else f"g{fmt.group_size}"
        if fmt.code_bits == 1:
            return f"has no 1-bit integers; quantize it as int2_sym_{group}"
        if fmt.code_bits not in _EVERYWHERE and not self.odd_bits:
            return (f"packs {fmt.code_bits} bits differently from one version to the next, with no mark of which; "
                    f"quantize it as int{_nearest(fmt.code_bits)}_sym_{group}, or --allow odd-bits for engines with "
                    "compressed-tensors 0.18 or newer, and vLLM")
        if not fmt.symmetric and not self.asymmetric:
            return ("with zero points cannot be loaded by transformers with compressed-tensors 0.18 to 0.20; quantize "
                    f"it as int{fmt.code_bits}_sym_{group}, or --allow asymmetric for engines that do, such as vLLM")
        return None

    def write(self, stored: Stored, out: Path, progress: Progress) -> list[str]:
        config = quantization_config(stored)
        write_folder(stored, out, config, lambda name, tensor: tensor.pack(), progress)
        return _warnings(config)


def quantization_config(stored: Stored) -> dict[str, Any]:
    """``quantization_config``: a group for each format, and the linears that stay as they are."""
    members: dict[IntFormat, list[str]] = {}
    for matrix in hub_matrices(stored):
        target, layout = stored.matrices[matrix.of]
        fmt = one_integer_format(layout)
        assert isinstance(fmt, IntFormat)
        whole = IntFormat(fmt.code_bits, group_of(fmt, target.shape[1]), fmt.symmetric)  # whatever the scale's dtype
        members.setdefault(whole, []).append(matrix.name)
    groups = {}
    for i, (fmt, names) in enumerate(sorted(members.items(), key=lambda m: m[0].name)):
        groups[f"group_{i}"] = {
            "targets": names, "format": "pack-quantized", "input_activations": None, "output_activations": None,
            "weights": {
                "num_bits": fmt.code_bits, "type": "int", "symmetric": fmt.symmetric, "dynamic": False,
                "strategy": "group" if fmt.group_size else "channel", "group_size": fmt.group_size, "actorder": None,
            },
        }
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": groups, "ignore": dense_linears(stored),
    }


def _nearest(bits: int) -> int:
    return min(b for b in _EVERYWHERE if b >= bits)


def _warnings(config: dict[str, Any]) -> list[str]:
    if len(config["config_groups"]) < 2:
        return []
    return ["several formats: transformers decodes all but the first wrongly, and says nothing, when it is asked to "
            "dequantize=True while loading; load without it"]

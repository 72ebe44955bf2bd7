"""compressed-tensors: what vLLM, SGLang and transformers read without fewbits.

Integers are ``pack-quantized``, mxfp4 and nvfp4 ``mxfp4-pack-quantized`` and ``nvfp4-pack-quantized``. Codes, scales
and zero points are stored as these have them already, so files are renamed and not repacked: a word of eight codes of 4
bits, the first in the lowest, is four bytes of two. Each format becomes one config group that lists its modules by
exact name: engines match groups in the order of their keys, which a ``save_pretrained`` sorts, and disjoint names are
the same in any order. Experts have a group of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.quant.errors import FormatError
from fewbits.quant.formats import layout_name
from fewbits.quant.formats.grid import GridFormat
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.targets import Target
from fewbits.quant.types import Layout, QuantizedTensor
from fewbits.serving.export.base import (
    FUSED,
    Progress,
    dense_experts,
    dense_linears,
    group_of,
    kind_obstacle,
    linear_format,
    one_format,
    packed,
    write_folder,
)
from fewbits.serving.export.names import hub_matrices
from fewbits.serving.export.stored import Stored

_EVERYWHERE = (2, 4, 8)
_FLOATS = {
    "mxfp4": {"strategy": "group", "scale_dtype": "torch.uint8"},
    "nvfp4": {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"},
}
"""Family of floats -> what its weights are besides 4 bits."""

Packable = IntFormat | GridFormat


@dataclass(frozen=True)
class CompressedTensors:
    """Attributes:
    odd_bits: take 3, 5, 6 and 7 bits: compressed-tensors packs them without gaps from 0.18 on, and with gaps before,
        and nothing in the files says which.
    asymmetric: take zero points, which transformers cannot load with compressed-tensors 0.18 to 0.20.
    dense_experts: take experts that were kept dense beside quantized linears, which transformers cannot load.
    nvfp4_experts: take experts in nvfp4, which transformers decodes without their scales of whole tensors.
    """

    odd_bits: bool = False
    asymmetric: bool = False
    dense_experts: bool = False
    nvfp4_experts: bool = False

    single_file = False

    def obstacle(self, target: Target, layout: Layout) -> str | None:
        if isinstance(floats := one_format(layout), GridFormat) and floats.family in _FLOATS:
            if target.kind == "expert" and floats.has_global and not self.nvfp4_experts:
                return ("with experts in nvfp4 is decoded wrongly by transformers, which says nothing; quantize them "
                        "as mxfp4, or --allow nvfp4-experts for engines that read them, such as vLLM")
            return kind_obstacle(target)
        fmt = linear_format(target, layout)
        if isinstance(fmt, str):
            return fmt
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
        if not self.dense_experts and (kept := dense_experts(stored)):
            raise FormatError(f"{kept[0]}: is kept dense, and transformers loads no experts from compressed-tensors "
                              f"but quantized ones ({len(kept)} tensors are like it); quantize them too, or --allow "
                              "dense-experts for engines that do, such as vLLM")
        config = quantization_config(stored)
        write_folder(stored, out, config, packed(stored, packed_tensors), progress)
        return _warnings(config) + _about_scales(stored)


def packed_tensors(name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """What stands for a matrix: bytes of two codes for floats, words and their shape for integers."""
    packed = tensor.pack()
    if isinstance(tensor.segments[0].format, GridFormat):
        del packed["weight_shape"]
        packed["weight_packed"] = packed["weight_packed"].view(torch.uint8)
    return packed


def quantization_config(stored: Stored) -> dict[str, Any]:
    """``quantization_config``: a group for each format, and the linears that stay as they are.

    Raises:
        FormatError: the experts have several formats.
    """
    experts = _experts_format(stored)
    members: dict[tuple[Packable, bool], list[str]] = {}
    for matrix in hub_matrices(stored):
        target, layout = stored.matrices[matrix.of]
        if target.kind == "expert":
            assert experts is not None
            members.setdefault((experts, True), []).append(_any_expert(matrix.name))
        else:
            fmt = _of_rows(_packable(layout), target.shape[1])
            # transformers looks for the module's own path, others for the name on the hub
            members.setdefault((fmt, False), []).extend(dict.fromkeys([matrix.name, matrix.of]))
    groups = {}
    for i, ((fmt, _), names) in enumerate(sorted(members.items(), key=lambda m: (m[0][1], m[0][0].name))):
        groups[f"group_{i}"] = {
            "targets": list(dict.fromkeys(names)), "format": _compression(fmt),
            "input_activations": None, "output_activations": None, "weights": _weights(fmt),
        }
    kinds = {group["format"] for group in groups.values()}
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed",
        "format": kinds.pop() if len(kinds) == 1 else "mixed-precision",
        "config_groups": groups,
        "ignore": [*dense_linears(stored), *dict.fromkeys(_any_expert(n) for n in dense_experts(stored))],
    }


def _packable(layout: Layout) -> Packable:
    """The format of a matrix that was found to have one that is taken."""
    fmt = one_format(layout)
    assert isinstance(fmt, Packable)
    return fmt


def _compression(fmt: Packable) -> str:
    return f"{fmt.family}-pack-quantized" if isinstance(fmt, GridFormat) else "pack-quantized"


def _weights(fmt: Packable) -> dict[str, Any]:
    """The arguments of compressed-tensors' QuantizationArgs."""
    shared = {"num_bits": fmt.code_bits, "group_size": fmt.group_size, "dynamic": False, "actorder": None}
    if isinstance(fmt, GridFormat):
        return shared | {"type": "float", "symmetric": True} | _FLOATS[fmt.family]
    strategy = "group" if fmt.group_size else "channel"
    return shared | {"type": "int", "symmetric": fmt.symmetric, "strategy": strategy}


def _of_rows(fmt: Packable, columns: int) -> Packable:
    """The format whatever the dtype of its scales, a group as long as the row being the row."""
    return fmt if isinstance(fmt, GridFormat) else IntFormat(fmt.code_bits, group_of(fmt, columns), fmt.symmetric)


def _any_expert(name: str) -> str:
    """The target that stands for one projection of all experts of a layer.

    transformers takes the first group with a regular expression that says "experts" for the format of all experts.
    """
    layer, index, projection = name.rsplit(".", 2)
    if not index.isdigit():  # one parameter for all experts on the hub too
        return name
    return rf"re:{re.escape(layer)}\.\d+\.{re.escape(projection)}$"


def _experts_format(stored: Stored) -> Packable | None:
    """The one format of all experts, or None where there are none.

    transformers decodes the experts of every layer by one group of the configuration, whatever the others say.
    """
    experts = {n: (t, _packable(layout)) for n, (t, layout) in stored.matrices.items() if t.kind == "expert"}
    if not experts:
        return None
    by_rows = {n: _of_rows(fmt, t.shape[1]) for n, (t, fmt) in experts.items()}
    by_groups = {n: _of_rows(fmt, -1) for n, (_, fmt) in experts.items()}
    for formats in (by_rows, by_groups):
        if len(set(formats.values())) == 1:
            return next(iter(formats.values()))
    first = next(iter(by_groups))
    other = next(n for n, fmt in by_groups.items() if fmt != by_groups[first])
    raise FormatError(f"{other}: compressed-tensors takes one format for all experts, since transformers decodes the "
                      f"others wrongly and says nothing; got {by_groups[other].name} here and {by_groups[first].name} "
                      f"in {first}; quantize them alike, e.g. as {_for_all(list(by_groups.values())).name}")


def _for_all(formats: Sequence[Packable]) -> Packable:
    """The narrowest format that is no coarser than any of these, all of them dividing the same matrices."""
    if floats := [f for f in formats if isinstance(f, GridFormat)]:
        return floats[0]
    groups = [f.group_size for f in formats if f.group_size]
    return IntFormat(max(f.code_bits for f in formats), math.gcd(*groups) if groups else None,
                     all(f.symmetric for f in formats if isinstance(f, IntFormat)))


def _nearest(bits: int) -> int:
    return min(b for b in _EVERYWHERE if b >= bits)


def _warnings(config: dict[str, Any]) -> list[str]:
    groups = config["config_groups"].values()
    out = []
    if sum(not any(t.startswith("re:") for t in g["targets"]) for g in groups) > 1:
        out.append("several formats: transformers decodes all linears but those of the first wrongly, and says "
                   "nothing, when it is asked to dequantize=True while loading; load without it")
    if any(g["weights"]["type"] == "float" for g in groups):
        out.append("floats: transformers decodes them to bfloat16 whatever the model's dtype is, so load it with "
                   "dtype=torch.bfloat16")
    return out


def _about_scales(stored: Stored) -> list[str]:
    """nvfp4 linears that an engine runs as one, and whose scales of whole tensors differ."""
    found = []
    for name in stored.matrices:
        parent, _, leaf = name.rpartition(".")
        parts = next((parts for parts in FUSED.values() if leaf == parts[0]), ())
        names = [n for n in (f"{parent}.{part}" for part in parts) if n in stored.matrices]
        if all(layout_name(stored.matrices[n][1]) == "nvfp4" for n in names):
            scales = {float(stored.dense(f"{n}.weight_global_scale")) for n in names}
            found += [name] * (len(scales) > 1)
    if not found:
        return []
    return [f"{found[0]}: nvfp4 has one more scale for each tensor, and vLLM takes the largest for all linears that it "
            f"runs as one, which decodes the others wrongly ({len(found)} groups of linears are like it); transformers "
            "reads each"]

"""The GPTQ layout: what GPTQModel, vLLM, SGLang and most engines before them read, at 4 and 8 bits.

A linear with N rows and K columns has ``qweight (K * bits / 32, N)``, codes packed down the columns; ``qzeros
(G, N * bits / 32)``, zero points packed along the rows; ``scales (G, N)`` float16; ``g_idx (K,)``, the group of each
column. The bit streams are those of this format already, so words are transposed and not repacked. Zero points are
stored as they are (``gptq_v2``) or less one (``gptq``), which every reader knows and which cannot hold a zero point 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.quant.bitpack import pack_rows
from fewbits.quant.errors import FormatError
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.targets import Target
from fewbits.quant.types import Layout, QuantizedTensor
from fewbits.serving.export.base import (
    FUSED,
    Progress,
    dense_experts,
    dense_linears,
    integer_format,
    linear_format,
    packed,
    write_folder,
)
from fewbits.serving.export.names import hub_matrices
from fewbits.serving.export.stored import Stored

_BITS = (4, 8)
_GROUPS = (16, 32, 64, 128, 256, 512, 1024)
_MULTIPLE = 32

_FUSED = {part: fused for fused, parts in FUSED.items() for part in parts}
"""Projections that engines run as one, and match rules against under one name."""


@dataclass(frozen=True)
class Gptq:
    """Attributes:
    asymmetric: take zero points, which GPTQModel reads (as ``gptq_v2``) and vLLM does not.
    """

    asymmetric: bool = False

    single_file = False

    def obstacle(self, target: Target, layout: Layout) -> str | None:
        fmt = linear_format(target, layout)
        if isinstance(fmt, str):
            return fmt
        group = "row" if fmt.group_size is None else f"g{fmt.group_size}"
        sym = "_sym" if fmt.symmetric else ""
        if fmt.code_bits not in _BITS:
            return (f"engines read 4 and 8 bits, got {fmt.code_bits}; quantize it as "
                    f"int{min(b for b in _BITS if b >= fmt.code_bits)}{sym}_{group}, or export to compressed-tensors")
        if not fmt.symmetric and not self.asymmetric:
            return (f"with zero points is not read by vLLM; quantize it as int{fmt.code_bits}_sym_{group}, or --allow "
                    "asymmetric for engines that do, such as GPTQModel")
        return _shape_obstacle(target.shape) or _group_obstacle(fmt, sym, target.shape[1])

    def write(self, stored: Stored, out: Path, progress: Progress) -> list[str]:
        modules = _modules(stored)
        version = 1 if all(f.symmetric for f in modules.values() if f) else 2
        config, split = quantization_config(modules, version, lm_head=_head_is_packed(stored))
        write_folder(stored, out, config, packed(stored, lambda name, tensor: gptq_tensors(name, tensor, version)),
                     progress)
        return _warnings(config, split)


def _shape_obstacle(shape: tuple[int, int]) -> str | None:
    for what, size in zip(("N", "K"), shape):
        if size % _MULTIPLE:
            return (f"needs rows and columns that are multiples of {_MULTIPLE}, got {what} = {size}; add it to keep, "
                    "or export to compressed-tensors")
    return None


def _group_obstacle(fmt: IntFormat, sym: str, columns: int) -> str | None:
    if fmt.group_size in (None, *_GROUPS):
        return None
    fits = [g for g in _GROUPS if columns % g == 0]
    near = min(fits, key=lambda g: abs(g - (fmt.group_size or 0)))  # never empty: K is a multiple of 32
    return (f"engines read groups of {', '.join(map(str, _GROUPS))} or a row, got {fmt.group_size}; quantize it as "
            f"int{fmt.code_bits}{sym}_g{near}")


def gptq_tensors(name: str, tensor: QuantizedTensor, version: int) -> dict[str, Tensor]:
    """``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of a matrix.

    Args:
        version: 1 stores zero points less one, 2 as they are.

    Raises:
        FormatError: a scale is no float16, the only dtype of scales that there is.
    """
    (segment,) = tensor.segments
    fmt = segment.format
    assert isinstance(fmt, IntFormat)
    bits, columns = fmt.code_bits, tensor.shape[1]
    scale = segment.params["scale"]
    if not torch.equal(scale.half().float(), scale.float()):
        raise FormatError(f"{name}: gptq stores scales in float16, got {scale.dtype} that does not fit; quantize with "
                          "--set format.scale_dtype=float16")
    zero = torch.full(scale.shape, fmt.levels // 2) if fmt.symmetric else segment.params["zero_point"].int()
    return {
        "qweight": pack_rows(segment.codes, bits).T,
        "qzeros": pack_rows((zero.T - (1 if version == 1 else 0)) % fmt.levels, bits),
        "scales": scale.half().T,
        "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // fmt.groups(columns)),
    }


# -- the configuration ------------------------------------------------------------------------------------------------


def _modules(stored: Stored) -> dict[str, IntFormat | None]:
    """Every linear by the names that engines may know it by -> its format, None where it stays dense."""
    out: dict[str, IntFormat | None] = dict.fromkeys([*dense_linears(stored), *dense_experts(stored)])
    for matrix in hub_matrices(stored):
        target, layout = stored.matrices[matrix.of]
        fmt = integer_format(layout)
        names = [matrix.name] if target.kind == "expert" else [matrix.name, matrix.of]
        out |= dict.fromkeys(names, IntFormat(fmt.code_bits, fmt.group_size, fmt.symmetric))
    return out


def _head_is_packed(stored: Stored) -> bool:
    head = stored.model.get_output_embeddings()
    return any(stored.model.get_submodule(t.module_path) is head for t, _ in stored.matrices.values())


def quantization_config(
    modules: Mapping[str, IntFormat | None], version: int, *, lm_head: bool
) -> tuple[dict[str, Any], list[list[str]]]:
    """``quantization_config``, and which linears of several formats some engines run as one."""
    base = Counter(f for f in modules.values() if f is not None).most_common(1)[0][0]
    rules: dict[str, dict[str, Any]] = {}
    split = []
    for pattern, names in _units(modules).items():
        formats = {modules[n] for n in names}
        if len(formats) > 1:
            split.append(names)
        for regex, fmt in _patterns(pattern, names, modules):
            if fmt is None:
                rules[f"-:^{regex}$"] = {}
            elif fmt != base:
                rules[f"+:^{regex}$"] = _fields(fmt)
    return {
        "quant_method": "gptq", "checkpoint_format": "gptq" if version == 1 else "gptq_v2", "pack_dtype": "int32",
        **_fields(base), "desc_act": False, "lm_head": lm_head, "dynamic": rules,
    }, split


def _fields(fmt: IntFormat) -> dict[str, Any]:
    return {"bits": fmt.code_bits, "group_size": fmt.group_size or -1, "sym": fmt.symmetric}


def _units(modules: Mapping[str, IntFormat | None]) -> dict[str, list[str]]:
    """Linears that some engine runs as one -> by the expression that matches each of them, and what they make."""
    out: dict[str, list[str]] = {}
    members: dict[str, list[str]] = {}
    for name in modules:
        parent, _, leaf = name.rpartition(".")
        owner, _, index = parent.rpartition(".")
        if index.isdigit() and owner.endswith("experts"):
            out.setdefault(rf"{re.escape(owner)}(\.\d+\.\w+)?", []).append(name)
        else:
            members.setdefault(f"{parent}.{_FUSED.get(leaf, leaf)}", []).append(name)
    for fused, names in members.items():
        every = dict.fromkeys([*names, fused]) if len(names) > 1 else names
        out["|".join(map(re.escape, every))] = names
    return {f"({p})" if "|" in p else p: names for p, names in out.items()}


def _patterns(
    pattern: str, names: list[str], modules: Mapping[str, IntFormat | None]
) -> list[tuple[str, IntFormat | None]]:
    """One expression for all of a unit where they are alike, else one each."""
    if len({modules[n] for n in names}) == 1:
        return [(pattern, modules[names[0]])]
    return [(re.escape(n), modules[n]) for n in names]


def _warnings(config: Mapping[str, Any], split: list[list[str]]) -> list[str]:
    out = []
    if any(rule.startswith("+:") for rule in config["dynamic"]):
        out.append("several formats: GPTQModel and vLLM read them through 'dynamic', which transformers ignores, so "
                   "that it cannot load this")
    if split:
        out.append(f"{', '.join(split[0][:3])} differ in format: vLLM and SGLang run them as one and cannot load this "
                   f"({len(split)} such groups); GPTQModel can")
    if config["checkpoint_format"] == "gptq_v2":
        out.append("zero points: checkpoint_format is gptq_v2, which GPTQModel reads; vLLM and SGLang do not")
    return out

"""What kernels read of weights in groups of few levels (``formats/levels.py``) and of tables (``formats/grid.py``).

Both are one decode. A code looks up rows of a small book, and the group's numbers are what these are multiplied by:

    value = sum_p coef_p / whole * book[kind * P + p, code]

with one kind and several ``p`` for levels, where the book is the design of the format, and one ``p`` and a kind chosen
by group for tables. Operands, rows first, so that rows can be picked:

- ``packed (N, words)`` int32: dense little-endian bit stream of codes of 1 to 4 bits, see ``quant/bitpack.py``;
- ``coef (N, P, G)`` of 16 bits, as stored (E4M3 and powers of two are exact in float16 and in bfloat16);
- ``kind (N, G)`` uint8, or ``(N, 0)`` where there is one;
- ``book (kinds * P, 2^bits)`` float32, kinds a power of two;
- ``whole (K,)`` float32: the scale of the whole tensor that numbers of nvfp4 are divided by, else 1; one number,
  expanded, so that its shape says K, which the words of a ragged row do not.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from fewbits.quant.bitpack import pack_rows, unpack_rows
from fewbits.quant.formats.grid import GridFormat, tables
from fewbits.quant.formats.levels import LevelsFormat

PER_ROW = 3
"""Operands that have the rows of the weight, from the first on."""


def levels(tensors: Mapping[str, Tensor], fmt: LevelsFormat, rows: int, columns: int) -> list[Tensor]:
    """The operands; trits become codes of 2 bits."""
    codes, params = fmt.unpack(tensors, rows, columns)
    packed = pack_rows(codes, fmt.code_bits) if fmt.trits else tensors["weight_packed"].contiguous()
    coef = _by_device(torch.stack([params[name] for name in fmt.names], 1))
    design = fmt.design(packed.device)
    book = F.pad(design.T, (0, (1 << fmt.code_bits) - len(design))).contiguous()
    one = torch.ones(1, device=packed.device)
    return [packed, coef, torch.empty(rows, 0, dtype=torch.uint8, device=packed.device), book, one.expand(columns)]


def grid(tensors: Mapping[str, Tensor], fmt: GridFormat, rows: int, columns: int) -> list[Tensor]:
    """The operands."""
    _, params = fmt.unpack(tensors, rows, columns)
    packed, scale = tensors["weight_packed"].contiguous(), params["scale"]
    if scale.dtype == torch.float32:
        scale = scale.to(torch.float16 if fmt.has_global else torch.bfloat16)
    kind = params.get("type", torch.empty(rows, 0, dtype=torch.uint8, device=packed.device))
    whole = tensors["weight_global_scale"] if fmt.has_global else torch.ones(1, device=packed.device)
    book = F.pad(tables(fmt.family, packed.device), (0, 0, 0, (1 << fmt.type_bits) - fmt.types))
    return [packed, _by_device(scale[:, None]), _by_device(kind), book, whole.expand(columns)]


def _by_device(params: Tensor) -> Tensor:
    """``(N, ...)``, on a GPU with the rows next to one another: a kernel there reads one group of many rows at once."""
    if not params.is_cuda:
        return params.contiguous()
    backwards = tuple(range(params.ndim))[::-1]
    return params.permute(backwards).contiguous().permute(backwards)


def decode(packed: Tensor, coef: Tensor, kind: Tensor, book: Tensor, whole: Tensor) -> Tensor:
    """float32 ``(N, K)``, equal to what the formats decode bit for bit."""
    rows, terms, groups = coef.shape
    entries = book.shape[1]
    codes = unpack_rows(packed, entries.bit_length() - 1, len(whole)).view(rows, groups, -1).long()
    if kind.shape[1]:
        codes += (kind.long() * (terms * entries))[..., None]
    unit = coef.float() / whole[:1]
    flat = book.flatten()
    total = flat[codes] * unit[:, 0, :, None]
    for p in range(1, terms):
        total += flat[codes + p * entries] * unit[:, p, :, None]
    return total.view(rows, -1)

"""The registry of formats: one file and one line each."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from fewbits.quant.errors import FormatError, nearest
from fewbits.quant.formats.fairy import FairyFormat
from fewbits.quant.formats.grid import TABLES, GridFormat
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.formats.levels import BASES, LevelsFormat
from fewbits.quant.formats.pvq import PVQFormat
from fewbits.quant.formats.rvq import RVQFormat
from fewbits.quant.formats.trellis import TrellisFormat
from fewbits.quant.formats.vq import LowRankVQFormat, ProductFormat, VQFormat
from fewbits.quant.types import Format, Layout

FORMATS: dict[str, Callable[[str], Format | None]] = {
    "int": IntFormat.parse,
    "levels": LevelsFormat.parse,
    "grid": GridFormat.parse,
    "trellis": TrellisFormat.parse,
    "rvq": RVQFormat.parse,
    "pvq": PVQFormat.parse,
    "vq": VQFormat.parse,
    "pq": ProductFormat.parse,
    "lrvq": LowRankVQFormat.parse,
    "fairy": FairyFormat.parse,
}
"""Family -> parser of a format name (None when the name is not of that family)."""


def parse_format(name: str) -> Format:
    """The format with this name, e.g. ``int4_g64``, ``int8_sym_row``, ``int3_g128_bf16``.

    Raises:
        FormatError: no family knows the name.
    """
    for parse in FORMATS.values():
        if (fmt := parse(name)) is not None:
            return fmt
    raise FormatError(f"format: got {name!r}, {nearest(name, EXAMPLES)}")


def named_format(entry: str, group: int) -> Format:
    """A format by name; one that names no group size, as ``int4`` or ``ternary_b3``, has groups of ``group``.

    Raises:
        FormatError: no such format.
    """
    try:
        return parse_format(entry)
    except FormatError as error:
        family, storage = _STORAGE.fullmatch(entry).groups()  # type: ignore[union-attr]
        try:
            return parse_format(f"{family}_g{group}{storage or ''}")
        except FormatError:
            raise error from None  # the message about what was asked for


_STORAGE = re.compile(r"(.*?)(_bf16|_f32|_b3)?", re.DOTALL)

MAX_AUTO_GROUP = 128


def auto_group(columns: int) -> int:
    """The group size where none is named: the largest power of two that divides K, up to 128."""
    return min(columns & -columns, MAX_AUTO_GROUP)


def resolve_layout(name: str, columns: int) -> Layout:
    """:func:`parse_layout` of a name that may leave group sizes to :func:`auto_group`, and say how many percent of the
    columns a run has: ``int4_g32[20%]+binary_row``. These are rounded to whole groups, and the last run has the rest.

    Raises:
        FormatError: unknown format, or groups do not divide the columns.
    """
    plain, flags = prefixed(name)
    *shares, last = plain.split("+")
    if "%" not in plain:
        *shares, last = [plain]
    runs: list[tuple[Format, int]] = []
    for share in shares:
        if (m := _SHARE.fullmatch(share)) is None:
            raise FormatError(f"layout: got {name!r}, needed shares and a rest like int4_g32[20%]+binary_row")
        fmt = parse_format(m[1])
        step = fmt.group_size or _WHOLE_WORDS
        runs.append((fmt, max(1, round(columns * float(m[2]) / 100 / step)) * step))
    if (rest := columns - sum(n for _, n in runs)) <= 0:
        raise FormatError(f"layout: {name!r} leaves nothing of {columns} columns to its last run; lower the shares")
    if runs:
        layout = Layout((*runs, (parse_format(last), rest)), **flags)
    elif "[" in last:
        layout = parse_layout(name, columns)
    else:
        layout = Layout(((named_format(last, auto_group(columns)), columns),), **flags)
    layout.check_groups()
    return layout


_SHARE = re.compile(r"([^\[\]]+)\[([0-9]{1,2}(?:\.[0-9]+)?)%\]")
_WHOLE_WORDS = 32
"""Columns whose codes fill whole words at any width."""


EXAMPLES = [f"int{b}{s}_{g}" for b in range(1, 9) for s in ("", "_sym") for g in ("g32", "g64", "g128", "row")]
EXAMPLES += [f"trellis{b}" for b in range(1, 5)] + [f"{f}{b}" for f in ("rvq", "pvq") for b in range(2, 5)]
EXAMPLES += [f"{b}{m}_{g}" for b in BASES for m in ("", "_mean") for g in ("g64", "g128", "row")]
EXAMPLES += [f"{t}_{g}" for t in TABLES if t[:2] not in ("mx", "nv") for g in ("g64", "g128", "row")]
EXAMPLES += ["mxfp4", "nvfp4", "ternary_mean_g128_b3", "vq8_v4", "vq8x2_v8", "vq12_v6", "pq8_v8", "lrvq8_v4_d3"]
EXAMPLES += [f"fairy{b}" for b in range(1, 4)]


_SORTED, _ROTATED, _SCALED = "perm:", "had:", "scl:"
_PREFIXES = re.compile(rf"(?:lr([1-9][0-9]{{0,4}}):)?({_SORTED})?({_ROTATED}|{_SCALED})?(.*)", re.DOTALL)
_RUN = re.compile(r"([^\[\]]+)\[([1-9][0-9]{0,8})\]")


def layout_name(layout: Layout) -> str:
    """``int4_g64`` for one run of columns; ``int4_g64[128]+int2_g64[448]`` for several.

    ``perm:`` before it where columns are sorted, ``had:`` where formats are rotated that do not ask for it, ``scl:``
    where rows and columns have scales, and ``lr16:`` before these where a product of rank 16 is added.
    """
    rotated = layout.rotated and not any(fmt.rotated for fmt, _ in layout.runs)
    runs = [fmt.name if len(layout.runs) == 1 else f"{fmt.name}[{columns}]" for fmt, columns in layout.runs]
    low_rank = f"lr{layout.low_rank}:" if layout.low_rank else ""
    return low_rank + _SORTED * layout.permuted + _ROTATED * rotated + _SCALED * layout.scaled + "+".join(runs)


def prefixed(name: str) -> tuple[str, dict[str, Any]]:
    """What follows the prefixes of a layout's name, and what they say, as arguments of :class:`Layout`."""
    low_rank, permuted, basis, rest = _PREFIXES.fullmatch(name).groups()  # type: ignore[union-attr]
    return rest, {"permuted": bool(permuted), "rotated": basis == _ROTATED, "scaled": basis == _SCALED,
                  "low_rank": int(low_rank or 0)}


def is_permuted(name: str) -> bool:
    """Whether a layout of this name has its columns sorted."""
    return prefixed(name)[1]["permuted"]


def parse_layout(name: str, columns: int) -> Layout:
    """Inverse of :func:`layout_name` for a tensor with ``columns`` columns.

    Raises:
        FormatError: unknown format, or the runs do not add up to ``columns``.
    """
    plain, flags = prefixed(name)
    if "[" not in plain:
        return Layout(((parse_format(plain), columns),), **flags)
    runs = []
    for run in plain.split("+"):
        if (m := _RUN.fullmatch(run)) is None:
            raise FormatError(f"layout: got {name!r}, needed runs like int4_g64[128]+int2_g64[448]")
        runs.append((parse_format(m[1]), int(m[2])))
    if sum(n for _, n in runs) != columns:
        raise FormatError(f"layout: {name!r} covers {sum(n for _, n in runs)} columns, the tensor has {columns}")
    return Layout(tuple(runs), **flags)

"""The registry of formats: one file and one line each."""

from __future__ import annotations

from collections.abc import Callable

from fewbits.quant.errors import FormatError, nearest
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.types import Format, Layout

FORMATS: dict[str, Callable[[str], Format | None]] = {
    "int": IntFormat.parse,
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


EXAMPLES = [f"int{b}{s}_{g}" for b in range(1, 9) for s in ("", "_sym") for g in ("g32", "g64", "g128", "row")]


def layout_name(layout: Layout) -> str:
    """``int4_g64`` for one run of columns; ``int4_g64[128]+int2_g64[448]`` for several."""
    if len(layout) == 1:
        return layout[0][0].name
    return "+".join(f"{fmt.name}[{columns}]" for fmt, columns in layout)


def parse_layout(name: str, columns: int) -> list[tuple[Format, int]]:
    """Inverse of :func:`layout_name` for a tensor with ``columns`` columns.

    Raises:
        FormatError: unknown format, or the runs do not add up to ``columns``.
    """
    if "[" not in name:
        return [(parse_format(name), columns)]
    layout = []
    for run in name.split("+"):
        fmt, _, count = run.rstrip("]").partition("[")
        if not count.isdecimal():
            raise FormatError(f"layout: got {name!r}, needed runs like int4_g64[128]+int2_g64[448]")
        layout.append((parse_format(fmt), int(count)))
    if sum(n for _, n in layout) != columns:
        raise FormatError(f"layout: {name!r} covers {sum(n for _, n in layout)} columns, the tensor has {columns}")
    return layout

"""Parts of a packed weight without unpacking it: some of its rows, some of its columns, rows of several in one.

Engines that spread a model over devices give each device some rows of a matrix (q, k, v, gate, up) or some columns (o,
down), and engines that fuse matrices put the rows of several one below the other. Tensors have their names in a
checkpoint, ``weight_packed`` and so on, and stay as :meth:`Layout.storage` describes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fewbits.quant.bitpack import WORD_BITS, pack_rows, unpack_rows
from fewbits.quant.errors import FormatError
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.types import Format, Layout

Packed = Mapping[str, Tensor]


def take_rows(tensors: Packed, layout: Layout, rows: Tensor) -> dict[str, Tensor]:
    """Rows ``rows (n,)`` of a packed ``(N, K)``, in that order; copies, so that the whole can be freed.

    Raises:
        FormatError: some rows of a weight that is coded as a whole.
    """
    if layout.whole:
        if len(rows) == int(tensors["weight_shape"][0]):
            return dict(tensors)
        raise FormatError("its rows are coded together, so they cannot be split over devices")
    return _by_rows([tensors], layout, lambda parts: parts[0].index_select(0, rows))


def stackable(layout: Layout) -> bool:
    """Whether matrices of a layout can be one: neither sorted nor coded as a whole, which each is by itself."""
    return not layout.permuted and not layout.whole


def stack_rows(parts: Sequence[Packed], layout: Layout) -> dict[str, Tensor]:
    """Matrices of one layout, one below the other."""
    assert len(parts) == 1 or stackable(layout)
    return dict(parts[0]) if len(parts) == 1 else _by_rows(parts, layout, torch.cat)


def _by_rows(parts: Sequence[Packed], layout: Layout, make: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    """``make`` applied to each tensor with rows first. Zero points are packed along the rows, so not as they lie."""
    heights = [int(p["weight_shape"][0]) for p in parts]
    out: dict[str, Tensor] = {}
    for i, (fmt, columns) in enumerate(layout.runs):
        bits = _integer(fmt).code_bits
        for local in fmt.storage(1, columns):
            name = f"{local}_{i}" if i else local
            stored = [p[name] for p in parts]
            if local == "weight_zero_point":
                zeros = [unpack_rows(t.T.contiguous(), bits, n).T for t, n in zip(stored, heights)]
                out[name] = pack_rows(make(zeros).T, bits).T.contiguous()
            else:
                out[name] = make(stored).contiguous()
    if layout.permuted:
        out["weight_perm"] = parts[0]["weight_perm"]
    return out | {"weight_shape": torch.tensor([len(out["weight_packed"]), layout.columns])}


def take_columns(tensors: Packed, layout: Layout, start: int, stop: int) -> tuple[dict[str, Tensor], Layout]:
    """Columns ``start`` to ``stop`` of a packed ``(N, K)``, and their layout.

    Raises:
        FormatError: a boundary lies within a group, or the columns are sorted.
    """
    if (start, stop) == (0, layout.columns):
        return dict(tensors), layout
    if not stackable(layout):
        how = "sorted" if layout.permuted else "coded together"
        raise FormatError(f"the columns are {how}, so they cannot be split over devices")
    rows = int(tensors["weight_shape"][0])
    out: dict[str, Tensor] = {}
    runs: list[tuple[Format, int]] = []
    at = 0
    for i, (fmt, columns) in enumerate(layout.runs):
        first, last = max(start - at, 0), min(stop - at, columns)
        at += columns
        if first >= last:
            continue
        names = {local: f"{local}_{i}" if i else local for local in fmt.storage(rows, columns)}
        run = _run_columns(_integer(fmt), {k: tensors[v] for k, v in names.items()}, columns, first, last)
        out |= {f"{k}_{len(runs)}" if runs else k: v for k, v in run.items()}
        runs.append((fmt, last - first))
    return out | {"weight_shape": torch.tensor([rows, stop - start])}, Layout(tuple(runs))


def _run_columns(fmt: IntFormat, tensors: Packed, columns: int, first: int, last: int) -> dict[str, Tensor]:
    group = fmt.group_size or columns
    if fmt.group_size and (first % group or last % group):
        raise FormatError(f"columns {first} to {last} of {columns} cut a group of {group}")
    out = dict(tensors)
    if fmt.group_size:
        groups = slice(first // group, last // group)
        out |= {k: v[:, groups].contiguous() for k, v in tensors.items() if k != "weight_packed"}
    packed, bits = tensors["weight_packed"], fmt.code_bits
    if first * bits % WORD_BITS == 0 and (last == columns or last * bits % WORD_BITS == 0):
        out["weight_packed"] = packed[:, first * bits // WORD_BITS : -(-last * bits // WORD_BITS)].contiguous()
    else:
        out["weight_packed"] = pack_rows(unpack_rows(packed, bits, columns)[:, first:last], bits)
    return out


def column_splits(layout: Layout, largest: int = 64) -> list[int]:
    """Into how many equal parts the columns can be split, so that no group is cut; up to ``largest``."""
    return [n for n in range(1, largest + 1) if n == 1 or (layout.columns % n == 0 and _uncut(layout, n))]


def _uncut(layout: Layout, parts: int) -> bool:
    size, at = layout.columns // parts, 0
    for fmt, columns in layout.runs:
        inside = [b - at for b in range(size, layout.columns, size) if at < b < at + columns]
        if fmt.group_size and any(b % fmt.group_size for b in inside):
            return False
        at += columns
    return stackable(layout)


def _integer(fmt: object) -> IntFormat:
    assert isinstance(fmt, IntFormat), "the only family that is not coded as a whole"
    return fmt

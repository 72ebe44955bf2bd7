"""Parts of a packed weight without unpacking it: some of its rows, some of its columns, rows of several in one.

Engines that spread a model over devices give each device some rows of a matrix (q, k, v, gate, up) or some columns (o,
down), and engines that fuse matrices put the rows of several one below the other. Tensors have their names in a
checkpoint, ``weight_packed`` and so on, and stay as :meth:`Layout.storage` describes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from fewbits.quant.bitpack import WORD_BITS, pack_rows, pack_trits, unpack_rows, unpack_trits
from fewbits.quant.errors import FormatError
from fewbits.quant.formats.grid import GridFormat
from fewbits.quant.formats.levels import LevelsFormat
from fewbits.quant.types import Format, Layout

Packed = Mapping[str, Tensor]

_SHARED = "weight_global_scale"
"""What all rows and columns share."""


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


def own_scale(parts: Sequence[Packed], layout: Layout) -> str | None:
    """Name of a tensor that is one for a whole matrix, where matrices differ in it."""
    names = (name for name in layout.dtypes if name.startswith(_SHARED))
    return next((n for n in names if any(not torch.equal(p[n], parts[0][n]) for p in parts[1:])), None)


def stack_rows(parts: Sequence[Packed], layout: Layout) -> dict[str, Tensor]:
    """Matrices of one layout, one below the other.

    Raises:
        FormatError: each has a scale of its own for all of it.
    """
    assert len(parts) == 1 or stackable(layout)
    if name := own_scale(parts, layout):
        found = ", ".join(f"{float(p[name]):.4g}" for p in parts)
        raise FormatError(f"{name}: got {found}, needed one number for matrices that are put into one; keep them apart")
    return dict(parts[0]) if len(parts) == 1 else _by_rows(parts, layout, torch.cat)


def _by_rows(parts: Sequence[Packed], layout: Layout, make: Callable[[list[Tensor]], Tensor]) -> dict[str, Tensor]:
    """``make`` applied to each tensor with rows first. Zero points are packed along the rows, so not as they lie;
    numbers of 8 bits as bytes, since few operations take them.
    """
    heights = [int(p["weight_shape"][0]) for p in parts]
    out: dict[str, Tensor] = {}
    for i, (fmt, columns) in enumerate(layout.runs):
        for local in fmt.storage(1, columns):
            name = f"{local}_{i}" if i else local
            stored = [p[name] for p in parts]
            if local == _SHARED:
                out[name] = stored[0]
            elif local == "weight_zero_point":
                bits = fmt.code_bits
                zeros = [unpack_rows(t.T.contiguous(), bits, n).T for t, n in zip(stored, heights)]
                out[name] = pack_rows(make(zeros).T, bits).T.contiguous()
            elif stored[0].dtype == torch.float8_e4m3fn:
                out[name] = make([t.view(torch.uint8) for t in stored]).view(torch.float8_e4m3fn)
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
        run = _run_columns(fmt, {k: tensors[v] for k, v in names.items()}, columns, first, last)
        out |= {f"{k}_{len(runs)}" if runs else k: v for k, v in run.items()}
        runs.append((fmt, last - first))
    return out | {"weight_shape": torch.tensor([rows, stop - start])}, Layout(tuple(runs))


def _run_columns(fmt: Format, tensors: Packed, columns: int, first: int, last: int) -> dict[str, Tensor]:
    group = fmt.group_size or columns
    if fmt.group_size and (first % group or last % group):
        raise FormatError(f"columns {first} to {last} of {columns} cut a group of {group}")
    out = dict(tensors)
    if fmt.group_size:
        start, stop = first // group, last // group
        numbers = tensors.keys() - {"weight_packed", "weight_type", _SHARED}
        out |= {name: tensors[name][:, start:stop].contiguous() for name in numbers}
        if "weight_type" in tensors:
            assert isinstance(fmt, GridFormat)
            out["weight_type"] = _cut_codes(tensors["weight_type"], fmt.type_bits, columns // group, start, stop)
    packed = tensors["weight_packed"]
    if isinstance(fmt, LevelsFormat) and fmt.trits:
        out["weight_packed"] = pack_trits(unpack_trits(packed, columns)[:, first:last])
    else:
        out["weight_packed"] = _cut_codes(packed, fmt.code_bits, columns, first, last)
    return out


def _cut_codes(packed: Tensor, bits: int, count: int, first: int, last: int) -> Tensor:
    """Codes ``first`` to ``last`` of ``count`` of each row; packed again only where they do not begin and end words."""
    if first * bits % WORD_BITS == 0 and (last == count or last * bits % WORD_BITS == 0):
        return packed[:, first * bits // WORD_BITS : -(-last * bits // WORD_BITS)].contiguous()
    return pack_rows(unpack_rows(packed, bits, count)[:, first:last], bits)


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

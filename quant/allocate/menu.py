"""Which layouts each tensor may get, and which tensors must get the same one: what the engine reads decides."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fewbits.calibration.stream import StreamedModel
from fewbits.quant.allocate.predict import in_nats
from fewbits.quant.errors import FormatError, RecipeError
from fewbits.quant.formats import MAX_AUTO_GROUP, auto_group, layout_name, named_format, prefixed
from fewbits.quant.formats.grid import GridFormat
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.formats.levels import LevelsFormat
from fewbits.quant.formats.scalar import ScalarFormat
from fewbits.quant.formats.trellis import DEFAULT_STATE_BITS, HALF_BITS, trellis_layout
from fewbits.quant.plan import ends_of
from fewbits.quant.recipe import Allocate, Recipe
from fewbits.quant.types import Format, Layout, nbytes


@dataclass(frozen=True)
class Engine:
    """What an engine reads.

    Attributes:
        menu: formats offered where the user names none; ``int4`` takes the group size auto.
        coded: formats of rotated weights that are offered too.
        fused: linears that read one input, and all experts of a layer, must share one format.
        bits, groups: legal ones (None: any); ``groups`` has None for one group per row.
        symmetric: bits at which only symmetric formats are read.
        blocks: bits -> columns that every group, be it a row, is a multiple of.
        floats: families of floats that are read too -> columns that a row is a multiple of.
        outside: whether it reads a quantized embedding and head.
        runs: whether a tensor may have several formats, over columns that may be sorted, and may be rotated.
    """

    menu: tuple[str, ...]
    coded: tuple[str, ...] = ()
    fused: bool = False
    bits: tuple[int, ...] | None = None
    groups: tuple[int | None, ...] | None = None
    symmetric: tuple[int, ...] = ()
    blocks: Mapping[int, int] = field(default_factory=dict)
    floats: Mapping[str, int] = field(default_factory=dict)
    outside: bool = False
    runs: bool = False

    def reads(self, layout: Layout) -> bool:
        if not self.runs and (layout.permuted or not layout.own_basis or layout.low_rank or len(layout.runs) > 1):
            return False
        return all(self._reads(fmt, columns) for fmt, columns in layout.runs)

    def _reads(self, fmt: Format, columns: int) -> bool:
        if self.runs and not isinstance(fmt, IntFormat):
            return True  # it is ours
        if isinstance(fmt, GridFormat) and fmt.family in self.floats:
            return columns % self.floats[fmt.family] == 0
        if isinstance(fmt, LevelsFormat):
            fmt = fmt.integers or fmt  # as exports write it
        if not isinstance(fmt, IntFormat):
            return False
        group = None if fmt.group_size == columns else fmt.group_size
        return (
            (self.bits is None or fmt.code_bits in self.bits) and (fmt.symmetric or fmt.code_bits not in self.symmetric)
            and (self.groups is None or group in self.groups or fmt.group_size in self.groups)
            and (fmt.group_size or columns) % self.blocks.get(fmt.code_bits, 1) == 0
        )


ENGINES: dict[str, Engine] = {
    "fewbits": Engine(("int2", "int3", "int4", "int5", "int6", "int8"),
                      ("trellis1", "trellis2", "trellis3", "trellis4"), outside=True, runs=True),
    "transformers": Engine(("int2_sym", "int4_sym", "int8_sym"), bits=(2, 4, 8), symmetric=(2, 4, 8),
                           floats={"mxfp4": 32, "nvfp4": 16}),
    # no nvfp4: linears that run as one must share the scale of the whole tensor there
    "vllm": Engine(("int2_sym", "int4_sym", "int8_sym"), (), True, (2, 4, 8), (None, 32, 64, 128), (2, 4, 8),
                   floats={"mxfp4": 32}),
    "sglang": Engine(("int4_sym", "int8_sym"), (), True, (4, 8), (None, 32, 64, 128), (4, 8)),
    # offered are the formats that take as many bytes there as here; larger groups and zero points take more
    "llama.cpp": Engine(
        ("int2_sym_g256", "int4_sym_g32", "int5_sym_g32", "int8_sym_g32"), bits=(2, 4, 5, 8), symmetric=(2, 8),
        blocks={2: 256, 4: 32, 5: 32, 8: 32}, floats={"mxfp4": 32, "nvfp4": 64}, outside=True),
}
"""Engine -> what it reads once the checkpoint is exported to it; the names of ``--target``."""


_HALVES = {f"trellis{bits}": bits for bits in HALF_BITS}
"""Entries of a menu that are two formats, each over half of the columns."""


Menu = Mapping[str, Mapping[str, Layout]]
"""Tensor name -> entry of the menu as the user wrote it -> the whole of this tensor stored so."""


@dataclass(frozen=True)
class Unit:
    """Tensors, or one group of their columns, that get one entry of the menu together.

    Attributes:
        costs: bytes of all of them that depend on the entry: codes, parameters and scales of rotations.
        columns: first column of the group, and the one after its last; None: all columns.
    """

    names: tuple[str, ...]
    entries: tuple[str, ...]
    costs: tuple[int, ...]
    columns: tuple[int, int] | None = None

    def part(self, layout: Layout) -> Layout:
        """What of a tensor's layout belongs to this unit. At one width throughout there is no reason to sort."""
        return dataclasses.replace(layout, permuted=False) if self.columns is None else layout.cut(*self.columns)

    def bytes_of(self, layout: Layout, rows: int) -> int:
        part = self.part(layout)
        return part.stored_bytes(rows) if self.columns is None else nbytes(part.codes_storage(rows))


def build_menu(recipe: Recipe, streamed: StreamedModel) -> dict[str, dict[str, Layout]]:
    """Layouts for each linear that the recipe quantizes; one that a rule gives a format has no other.

    Under a budget of everything stored, embedding and head have a choice too, where the damage model can judge them.

    Raises:
        RecipeError: the engine does not read a format that was asked for, or nothing is left to choose from.
        FormatError: no format of the menu fits a tensor.
    """
    wanted = recipe.allocate.formats or _offered(recipe.allocate)
    out: dict[str, dict[str, Layout]] = {}
    for name, target in streamed.targets.items():
        if streamed.block_index(name) is None or target.kind == "embedding":
            continue
        columns = target.shape[1]
        if (rule := recipe.rule_for(name)) is not None:
            own, cut = [] if rule == "keep" else [rule], None
        else:
            own, cut = [] if recipe.keeps(name) else wanted, _column_group(recipe.allocate, columns)
        if own:
            out[name] = _entries(own, name, target.shape, cut, recipe.allocate)
    if not out:
        raise RecipeError(f"keep: leaves nothing to quantize of {len(streamed.targets)} tensors; keep fewer")
    for name in _outside(recipe, streamed) if ENGINES[recipe.allocate.target].outside else []:
        target = streamed.targets[name]
        entries = _entries(wanted, name, target.shape, None, recipe.allocate)
        if target.kind == "embedding":  # looked up row by row
            entries = {e: layout for e, layout in entries.items() if not layout.whole}
        if entries:
            out[name] = entries
    return out


def _offered(want: Allocate) -> list[str]:
    """The menu where the user names none. Damage models that know widths alone cannot tell families apart."""
    engine = ENGINES[want.target]
    coded = engine.coded if in_nats(want.damage) and want.unit != "columns" else ()
    return [*coded, *engine.menu]


def _outside(recipe: Recipe, streamed: StreamedModel) -> list[str]:
    """Embedding and head, unless a rule or ``keep`` has decided; a head that is tied has the table's format."""
    if not {"bpw_total", "size", "fits_in"} & set(recipe.budget.given) or not in_nats(recipe.allocate.damage):
        return []
    tied = {n.rpartition(".")[0]: t.rpartition(".")[0] for n, t in streamed.tied.items()}
    own = {n for n in ends_of(streamed) if recipe.rule_for(n) is not None or recipe.keeps(n)}
    heads = {n for n in tied if n in own or recipe.lm_head}  # these have weights of their own now
    return [n for n in ends_of(streamed) if n not in own and n not in tied
            and not any(tied[h] == n for h in heads)]


def _column_group(want: Allocate, columns: int) -> int | None:
    """Columns of a group that has a width of its own; None where there is nothing to tell apart."""
    return want.column_group if want.unit == "columns" and columns > want.column_group else None


def _entries(
    wanted: Sequence[str], name: str, shape: tuple[int, int], group: int | None, want: Allocate
) -> dict[str, Layout]:
    engine, (rows, columns) = ENGINES[want.target], shape
    found: dict[str, Layout] = {}
    reasons = []
    for entry in wanted:
        if entry not in _HALVES:
            named_format(prefixed(entry)[0], MAX_AUTO_GROUP)  # an unknown name is no matter of this tensor
        try:
            layout = _layout(entry, columns, group)
            layout.storage(rows)
        except FormatError as error:
            reasons.append(str(error))
            continue
        if not engine.reads(layout):
            raise _unreadable("--formats", name, layout, want)
        if want.damage.startswith("baq") and min(fmt.code_bits for fmt, _ in layout.runs) < 2:
            raise RecipeError(f"--formats: got {layout_name(layout)} ({name}), BAQ's closed form needs 2 bits or more "
                              "(one step over the range is no better than none); leave it out")
        found[entry] = layout
    if not found:
        raise FormatError(f"{name}: no format of {', '.join(wanted)} fits: {reasons[0]}, or add it to keep")
    return found


def _layout(entry: str, columns: int, group: int | None) -> Layout:
    if (half := _HALVES.get(entry)) is not None:
        layout = trellis_layout(half, DEFAULT_STATE_BITS, columns)
    else:
        name, flags = prefixed(entry)
        if flags["permuted"]:
            raise RecipeError(f"--formats: got {entry}, columns are sorted to give them formats of their own; "
                              "leave perm: out and set allocate.unit = 'columns'")
        fmt = named_format(name, group or auto_group(columns))
        layout = Layout(((fmt, columns),), **flags)
    if not group:
        layout.check_groups()
        return layout
    if not layout.own_basis or layout.low_rank:
        why = "a term of low rank is of all columns, none of them"
        if not layout.own_basis:
            why = "scales or a rotation leave no columns"
        raise RecipeError(f"--formats: got {entry}, {why} that matter more than others; set "
                          "allocate.unit = 'tensor', or leave it out")
    return _sorted_layout(layout.runs[0][0], columns, group)


def _sorted_layout(fmt: Format, columns: int, group: int) -> Layout:
    """Sorted columns at one width; parameters are shared within a group of columns, the last of which may be short."""
    parts = []
    for start in range(0, columns, group):
        n = min(group, columns - start)
        own = fmt
        if isinstance(fmt, ScalarFormat) and (fmt.group_size is None or (n < group and n % fmt.group_size)):
            own = fmt.in_groups(n)
        own.groups(n)
        parts.append(Layout(((own, n),), permuted=True))
    return Layout.join(parts)


def require_readable(layouts: Mapping[str, Layout], want: Allocate) -> None:
    """Raise RecipeError for a layout that the engine does not read, naming the tensor."""
    for name, layout in layouts.items():
        if not ENGINES[want.target].reads(layout):
            raise _unreadable("--target", name, layout, want)


def _unreadable(flag: str, name: str, layout: Layout, want: Allocate) -> RecipeError:
    menu = ", ".join([*_offered(want), *ENGINES[want.target].floats])
    whole = ", for whole tensors; set allocate.unit = 'tensor'" if layout.permuted or len(layout.runs) > 1 else ""
    return RecipeError(f"{flag}: {want.target} does not read {layout_name(layout)} ({name}); it reads {menu}{whole}")


def build_units(menu: Menu, streamed: StreamedModel, groups: Sequence[Sequence[str]], recipe: Recipe) -> list[Unit]:
    """Tie tensors as the engine and ``allocate.unit`` demand; a unit can have the entries that all of it can have.

    Args:
        groups: targets that read one input, from a pass over the model.

    Raises:
        FormatError: tensors that are tied have no format in common.
    """
    engine = ENGINES[recipe.allocate.target]
    first = {name: group[0] for group in groups for name in group}
    members: dict[str, list[str]] = {}
    for name in menu:
        target = streamed.targets[name]
        if recipe.allocate.unit == "block":
            key = f"block {streamed.block_index(name)}"
        elif target.kind == "expert":  # one grouped product for all experts of a layer
            key = target.module_path if engine.fused else name.rpartition(".")[0]
        else:
            key = first.get(name, name) if engine.fused else name
        members.setdefault(key, []).append(name)
    units = []
    for names in members.values():
        entries = tuple(e for e in menu[names[0]] if all(e in menu[n] for n in names))
        if not entries:
            raise FormatError(f"{names[0]}: must have the format of {', '.join(names[1:3])}, and they have none in "
                              "common; give one rule to all of them, or keep them")
        rows = {n: streamed.targets[n].shape[0] for n in names}
        for columns in _column_units(menu[names[0]][entries[0]], recipe.allocate.column_group):
            unit = Unit(tuple(names), entries, (), columns)
            costs = (sum(unit.bytes_of(menu[n][e], r) for n, r in rows.items()) for e in entries)
            units.append(dataclasses.replace(unit, costs=tuple(costs)))
    return units


def _column_units(layout: Layout, group: int) -> list[tuple[int, int] | None]:
    """Groups of columns that are units of their own; all columns as one where they are not sorted."""
    if not layout.permuted:
        return [None]
    return [(start, min(start + group, layout.columns)) for start in range(0, layout.columns, group)]


def without_idle_sorting(units: Sequence[Unit], choice: Sequence[int]) -> list[Unit]:
    """Tensors whose groups of columns all chose the same are whole again: no permutation is stored for nothing."""
    members: dict[tuple[str, ...], list[int]] = {}
    for i, unit in enumerate(units):
        members.setdefault(unit.names, []).append(i)
    out: list[Unit] = []
    for names, own in members.items():
        if len(own) > 1 and len({choice[i] for i in own}) == 1:
            costs = tuple(map(sum, zip(*(units[i].costs for i in own))))
            out.append(Unit(names, units[own[0]].entries, costs))
        else:
            out += [units[i] for i in own]
    return out

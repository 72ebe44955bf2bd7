"""Which formats each tensor may get, and which tensors must get the same one: what the engine reads decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fewbits.calibration.stream import StreamedModel
from fewbits.quant.allocate.predict import in_nats
from fewbits.quant.errors import FormatError, RecipeError
from fewbits.quant.formats import parse_format
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.plan import ends_of
from fewbits.quant.recipe import MAX_AUTO_GROUP, Recipe
from fewbits.quant.targets import Target
from fewbits.quant.types import Format, stored_bytes


@dataclass(frozen=True)
class Engine:
    """What an engine reads.

    Attributes:
        menu: formats offered where the user names none; ``int4`` takes the group size auto.
        fused: linears that read one input, and all experts of a layer, must share one format.
        bits, groups: legal ones (None: any); ``groups`` has None for one group per row.
        symmetric: whether only symmetric formats are read.
        outside: whether it reads a quantized embedding and head.
    """

    menu: tuple[str, ...]
    fused: bool = False
    bits: tuple[int, ...] | None = None
    groups: tuple[int | None, ...] | None = None
    symmetric: bool = False
    outside: bool = False

    def reads(self, fmt: IntFormat, columns: int) -> bool:
        group = None if fmt.group_size == columns else fmt.group_size
        return (
            (self.bits is None or fmt.code_bits in self.bits) and (fmt.symmetric or not self.symmetric)
            and (self.groups is None or group in self.groups or fmt.group_size in self.groups)
        )


ENGINES: dict[str, Engine] = {
    "fewbits": Engine(("int2", "int3", "int4", "int5", "int6", "int8"), outside=True),
    "transformers": Engine(("int2", "int4", "int8"), bits=(2, 4, 8)),
    "vllm": Engine(("int2_sym", "int4_sym", "int8_sym"), True, (2, 4, 8), (None, 32, 64, 128), True),
    "sglang": Engine(("int4_sym", "int8_sym"), True, (4, 8), (None, 32, 64, 128), True),
    "llama.cpp": Engine(("int4_sym_g32", "int4_g32", "int8_sym_g32"), bits=(4, 8), groups=(32,)),
}
"""Engine -> what it reads once the checkpoint is exported to it; the names of ``--target``."""


Menu = Mapping[str, Mapping[str, Format]]
"""Tensor name -> entry of the menu as the user wrote it -> what it means for this tensor's K."""


@dataclass(frozen=True)
class Unit:
    """Tensors that get one entry of the menu together.

    Attributes:
        costs: stored bytes of all of them, per entry.
    """

    names: tuple[str, ...]
    entries: tuple[str, ...]
    costs: tuple[int, ...]


def build_menu(recipe: Recipe, streamed: StreamedModel) -> dict[str, dict[str, Format]]:
    """Formats for each linear that the recipe quantizes; one that a rule gives a format has no other.

    Under a budget of everything stored, embedding and head have a choice too, where the damage model can judge them.

    Raises:
        RecipeError: the engine does not read a format that was asked for, or nothing is left to choose from.
        FormatError: no format of the menu fits a tensor.
    """
    engine = ENGINES[recipe.allocate.target]
    wanted = recipe.allocate.formats or list(engine.menu)
    out: dict[str, dict[str, Format]] = {}
    for name, target in streamed.targets.items():
        if streamed.block_index(name) is None or target.kind == "embedding":
            continue
        columns = target.shape[1]
        if (rule := recipe.rule_for(name)) is not None:
            own = [] if rule == "keep" else [rule]
        else:
            own = [] if recipe.keeps(name) else wanted
        if own:
            out[name] = _formats(own, name, columns, engine, recipe.allocate.target)
    if not out:
        raise RecipeError(f"keep: leaves nothing to quantize of {len(streamed.targets)} tensors; keep fewer")
    for name in _outside(recipe, streamed) if engine.outside else []:
        out[name] = _formats(wanted, name, streamed.targets[name].shape[1], engine, recipe.allocate.target)
    return out


def _outside(recipe: Recipe, streamed: StreamedModel) -> list[str]:
    """Embedding and head, unless a rule or ``keep`` has decided; a head that is tied has the table's format."""
    if not {"bpw_total", "size", "fits_in"} & set(recipe.budget.given) or not in_nats(recipe.allocate.damage):
        return []
    tied = {n.rpartition(".")[0]: t.rpartition(".")[0] for n, t in streamed.tied.items()}
    own = {n for n in ends_of(streamed) if recipe.rule_for(n) is not None or recipe.keeps(n)}
    heads = {n for n in tied if n in own or recipe.lm_head}  # these have weights of their own now
    return [n for n in ends_of(streamed) if n not in own and n not in tied
            and not any(tied[h] == n for h in heads)]


def _formats(
    wanted: Sequence[str], name: str, columns: int, engine: Engine, engine_name: str
) -> dict[str, Format]:
    found: dict[str, Format] = {}
    reasons = []
    for entry in wanted:
        fmt = named_format(entry, columns)
        try:
            fmt.groups(columns)
        except FormatError as error:
            reasons.append(str(error))
            continue
        if isinstance(fmt, IntFormat) and not engine.reads(fmt, columns):
            raise RecipeError(
                f"--formats: {engine_name} does not read {fmt.name} ({name}); it reads {', '.join(engine.menu)}"
            )
        found[entry] = fmt
    if not found:
        raise FormatError(f"{name}: no format of {', '.join(wanted)} fits: {reasons[0]}, or add it to keep")
    return found


def require_readable(formats: Mapping[str, Format], targets: Mapping[str, Target], engine_name: str) -> None:
    """Raise RecipeError for a format that the engine does not read, naming the tensor."""
    engine = ENGINES[engine_name]
    for name, fmt in formats.items():
        if isinstance(fmt, IntFormat) and not engine.reads(fmt, targets[name].shape[1]):
            raise RecipeError(f"--target: {engine_name} does not read {fmt.name} ({name}); "
                              f"it reads {', '.join(engine.menu)}")


def named_format(entry: str, columns: int) -> Format:
    """A format by name; ``int4`` and ``int4_sym`` take the largest power of two that divides K, up to 128.

    Raises:
        FormatError: no such format.
    """
    try:
        return parse_format(entry)
    except FormatError as error:
        try:
            return parse_format(f"{entry}_g{min(columns & -columns, MAX_AUTO_GROUP)}")
        except FormatError:
            raise error from None  # the message about what was asked for


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
        shapes = {n: streamed.targets[n].shape for n in names}
        costs = tuple(sum(stored_bytes([(menu[n][e], s[1])], s) for n, s in shapes.items()) for e in entries)
        units.append(Unit(tuple(names), entries, costs))
    return units

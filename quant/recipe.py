"""Recipes: strict TOML, one choice on each axis. Everything that can change a number stands here.

An unknown key is an error that suggests the nearest known one. Every key has a default, so a recipe says only what it
changes; ``Recipe.to_toml`` writes all of them, and that file is what a checkpoint carries.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tomli_w
import torch
from pydantic import BaseModel, ConfigDict, Field

from fewbits.quant.errors import FormatError, RecipeError, nearest
from fewbits.quant.formats import auto_group, is_permuted, layout_name, parse_format, parse_layout, resolve_layout
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.formats.trellis import DEFAULT_STATE_BITS, HALF_BITS, trellis_layout
from fewbits.quant.formats.vq import LowRankVQFormat, VQFormat
from fewbits.quant.quantizers import QUANTIZERS
from fewbits.quant.refiners import EFFORTS, REFINERS, Refiner
from fewbits.quant.types import Format, Layout, Quantizer

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _bits(value: Any) -> int | float:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if (whole and 1 <= value <= 8) or (isinstance(value, float) and value in HALF_BITS):
        return value
    raise ValueError("needed 1 to 8; trellis codes have 1 to 4, also 1.5, 2.5 and 3.5")


# one validator, so that an error names the key and not a member of a union
Bits = Annotated[int | float, pydantic.PlainValidator(_bits, json_schema_input_type=float)]


class Weights(_Table):
    """Which format weights get."""

    layout: str = Field(
        "", description="a layout by its name in place of all keys below, e.g. ternary_mean_g128 or had:nf4; without "
                        "a group size it is auto"
    )
    family: Literal["int", "trellis", "rvq", "pvq", "vq", "lrvq"] = Field(
        "int", description="integers; codes of rotated weights: trellis, residual (rvq) and pyramid vectors (pvq); "
                           "vectors with codebooks of their own (vq; lrvq: of low rank)"
    )
    bits: Bits = Field(4, description="of a code; trellis: 1 to 4, also in steps of a half")
    group_size: Annotated[int, Field(ge=1)] | Literal["auto", "row"] = Field(
        "auto", description="int: auto is the largest power of two dividing K <= 128"
    )
    symmetric: bool = Field(False, description="int: no zero points")
    scale_dtype: Literal["float16", "bfloat16", "float32"] = Field("float16", description="int")
    rotated: bool = Field(False, description="int, vq, lrvq: code a rotated weight; the other families do anyway")
    vector: Annotated[int, Field(ge=2, le=32)] = Field(4, description="vq, lrvq: weights in a vector")
    rank: Annotated[int, Field(ge=1)] = Field(3, description="lrvq: of the codebook, at most the weights in a vector")
    outliers: Annotated[float, Field(ge=0, lt=50)] = Field(
        0.0, description="vq: percent of the columns, those with the largest inputs, that get twice the bits"
    )
    low_rank: Annotated[int, Field(ge=0)] = Field(
        0, description="rank of a product of two float16 matrices that is added to the codes"
    )
    row_weights: Literal["none", "fisher"] = Field(
        "none", description="of low_rank; fisher: by how much the model's output feels each row, from gradients"
    )
    state_bits: Annotated[int, Field(ge=10, le=16)] = Field(
        DEFAULT_STATE_BITS, description="trellis: quality against time, which doubles with each"
    )

    @pydantic.model_validator(mode="after")
    def _possible(self) -> Weights:
        if self.layout:
            others = [k for k, f in type(self).model_fields.items() if k not in ("layout", "row_weights")
                      and getattr(self, k) != f.default]
            if others:
                raise ValueError(f"got layout = {self.layout!r} and {', '.join(others)}, needed one or the other; "
                                 "leave one of them out")
        if self.family == "trellis" and self.bits > 4:
            raise ValueError(f"got {self.bits} bits, trellis codes have 1 to 4; set format.family = 'int'")
        if self.family in ("rvq", "pvq") and self.bits not in (2, 3, 4):
            raise ValueError(f"got {self.bits} bits, {self.family} has 2, 3 or 4; set format.family = 'trellis'")
        if self.family in ("vq", "lrvq"):
            self._codebook_format()
        if self.family == "vq" and self.outliers and self.rotated:
            raise ValueError(f"got {self.outliers} % of outliers and a rotation, which leaves no column larger than "
                             "others; set format.outliers = 0 or format.rotated = false")
        if self.rank > self.vector and self.family == "lrvq":
            raise ValueError(f"got rank {self.rank}, needed at most the {self.vector} weights of a vector")
        if self.family == "int" and self.bits % 1:
            raise ValueError(f"got {self.bits} bits, integers have 1 to 8 whole ones; give a budget, --bpw {self.bits}")
        return self

    def _codebook_format(self, times: int = 1) -> Format:
        """The vector format at ``times`` the bits; raises ValueError when there is none.

        Indexes of a byte are the easiest to read, so up to 4 codebooks of 256 come before a larger one.
        """
        index, stages = float(self.bits * self.vector * times), 1
        if self.family == "vq" and index % 8 == 0 and index <= 32:
            index, stages = 8.0, int(index // 8)
        if index % 1 or not 8 <= index <= 16:
            raise ValueError(f"got {self.bits} bits and vectors of {self.vector}, needed indexes of 8 to 16 bits in "
                             "all" + (", or 24 or 32" if self.family == "vq" else "") + "; set format.vector")
        if self.family == "lrvq":
            return LowRankVQFormat(int(index), self.vector, self.rank)
        return VQFormat(int(index), self.vector, stages)

    def for_columns(self, columns: int) -> Layout:
        """The layout of a tensor of K = ``columns``; raises FormatError when it cannot have the format."""
        if self.layout:
            return resolve_layout(self.layout, columns)
        if self.family == "trellis":
            layout = trellis_layout(self.bits, self.state_bits, columns)
        elif self.family in ("vq", "lrvq"):
            layout = self._of_codebooks(columns)
        elif self.family != "int":
            layout = Layout.of(parse_format(f"{self.family}{self.bits}"), columns)
        else:
            if self.group_size == "auto":
                group: int | None = auto_group(columns)
            else:
                group = None if self.group_size == "row" else self.group_size
            bits = int(self.bits)
            layout = Layout.of(IntFormat(bits, group, self.symmetric, getattr(torch, self.scale_dtype)), columns)
        layout.check_groups()
        return dataclasses.replace(layout, rotated=self.rotated or layout.rotated, low_rank=self.low_rank)

    def _of_codebooks(self, columns: int) -> Layout:
        inner = self._codebook_format()
        if not (outer := math.ceil(columns * self.outliers / 100)):
            return Layout.of(inner, columns)
        return Layout(((self._codebook_format(2), outer), (inner, columns - outer)), permuted=True)


class Calibration(_Table):
    """Which text and images the statistics come from, and how they are taken."""

    sources: list[str] = ["default"]
    images: str = Field("", description="folder or JSONL of images with text, for models that take images")
    image_fraction: float = Field(0.5, gt=0, lt=1, description="of the rows, with images, where there are images")
    samples: int = Field(128, ge=1)
    seqlen: int = Field(512, ge=2)
    order: Literal["random", "first"] = "random"
    inputs: Literal["quantized", "original"] = Field(
        "quantized", description="statistics of the inputs that the quantized blocks before this one produce, or not"
    )
    true_sequential: bool = Field(False, description="q/k/v, then o, then gate/up, then down, one after another")
    skip_tokens: int = Field(0, ge=0, description="leading tokens of each row left out of statistics (attention sinks)")
    dtype: Literal["float32", "bfloat16", "auto"] = Field(
        "float32", description="of calibration; auto: bfloat16 where the processor multiplies it natively"
    )


class Rule(_Table):
    """A format for the tensors whose names match."""

    match: str
    format: str


class Budget(_Table):
    """What the result may take; at most one of the first four. The result meets it from below."""

    bpw: float | None = Field(None, gt=0, description="bits per weight over all linears of the decoder blocks")
    bpw_total: float | None = Field(None, gt=0, description="bits per weight over everything stored")
    size: int | None = Field(None, gt=0, description="bytes of the weight files")
    fits_in: int | None = Field(None, gt=0, description="bytes of memory: weights, KV cache and activations")
    ctx: int = Field(4096, ge=1, description="tokens of context that fits_in counts")
    batch: int = Field(1, ge=1, description="sequences at a time that fits_in counts")

    @pydantic.model_validator(mode="after")
    def _one(self) -> Budget:
        if len(given := self.given) > 1:
            raise ValueError(f"got {' and '.join(given)}, needed one of them")
        return self

    @property
    def given(self) -> list[str]:
        """The one that is set, by its key."""
        return [k for k in ("bpw", "bpw_total", "size", "fits_in") if getattr(self, k) is not None]


class Allocate(_Table):
    """How a budget is spent."""

    damage: str = Field("measured", description="the model of what a format does to a tensor")
    formats: list[str] = Field([], description="the menu, e.g. int2_g64, or int2 for the group size auto")
    unit: Literal["tensor", "block", "columns"] = Field(
        "tensor", description="what gets one format of its own; columns: groups of a tensor's columns, sorted"
    )
    column_group: int = Field(
        64, ge=32, multiple_of=32, description="columns of such a group; 32 of them fill whole words at any width"
    )
    target: Literal["fewbits", "vllm", "sglang", "transformers", "llama.cpp"] = "fewbits"
    rivals: list[str] = Field([], description="damage models (or uniform) whose plans compete by measured KL")
    refine: Literal["none", "evopress"] = "none"
    generations: int = Field(20, ge=1, description="of evopress")
    offspring: int = Field(16, ge=1, description="of evopress, in each generation")
    trust: int = Field(0, ge=0, description="tensors on which measured KL checks the damage model; 0 does not")


class Recipe(_Table):
    """A recipe: quantizer, format, calibration, budget, and which tensors are left alone.

    Attributes:
        plan: layouts by exact name, as an allocation made them; what is not named stays dense. Wins over all else.
        keep: glob patterns of linears that stay dense, e.g. ``*.down_proj``.
        rules: formats for tensors by name, first match wins; may also name ``lm_head`` or an embedding.
        refine: refiners by name, in the order in which they run, each with its options.
        lm_head, embeddings: quantize them too, with the recipe's format (off by default).
    """

    name: str = "custom"
    description: str = ""
    quantizer: dict[str, Any] = {"name": "gptq"}
    format: Weights = Weights()
    calibration: Calibration = Calibration()
    keep: list[str] = ["*.gate", "*.router", "*.shared_expert_gate"]
    rules: list[Rule] = []
    budget: Budget = Budget()
    allocate: Allocate = Allocate()
    plan: dict[str, str] = {}
    refine: dict[str, dict[str, Any]] = {}
    lm_head: bool = False
    embeddings: bool = False

    def make_quantizer(self) -> Quantizer:
        """The quantizer with the options of this recipe; raises RecipeError for an unknown one or a bad value."""
        options = dict(self.quantizer)
        name = options.pop("name", None)
        if name not in QUANTIZERS:
            raise RecipeError(f"quantizer.name: got {name!r}, {nearest(str(name), list(QUANTIZERS))}")
        return _made(QUANTIZERS[name], name, options, "quantizer.")

    def make_refiners(self) -> dict[str, Refiner]:
        """The refiners with their options; raises RecipeError for an unknown one or a bad value."""
        out = {}
        for name, options in self.refine.items():
            if name not in REFINERS:
                raise RecipeError(f"refine.{name}: {nearest(name, list(REFINERS))}")
            out[name] = _made(REFINERS[name], name, options, f"refine.{name}.")
        stages = [r.stage for r in out.values()]
        if stages != sorted(stages):  # "block" comes before "model"
            raise RecipeError(f"refine: got {', '.join(out)}, needed those that tune one block before those that tune "
                              "the whole model; change their order")
        return out

    def with_effort(self, effort: str) -> Recipe:
        """The recipe with the refiners' budget raised or lowered.

        Raises:
            RecipeError: no such effort, or a recipe without refiners.
        """
        if effort not in EFFORTS:
            raise RecipeError(f"--effort: got {effort!r}, {nearest(effort, list(EFFORTS))}")
        refiners = self.make_refiners()
        if not refiners:
            raise RecipeError(f"--effort: recipe {self.name} refines nothing, so there is nothing to spend it on; use "
                              "best-4bit, best-3bit or best-2bit, or give the recipe a table [refine.pv]")
        refine = {name: asdict(r.with_effort(effort)) for name, r in refiners.items()}
        return self.model_copy(update={"refine": refine})

    def layout_for(self, name: str, columns: int, *, kind: str, is_head: bool) -> Layout | None:
        """The layout of a tensor, or None where it stays dense.

        Raises:
            FormatError: it does not fit K = ``columns``, or sorts the columns of an embedding.
        """
        if self.plan:
            return self._planned(name, columns, kind) if name in self.plan else None
        if (rule := self.rule_for(name)) is not None:
            if rule == "keep":
                return None
        elif self.keeps(name) or (is_head and not self.lm_head) or (kind == "embedding" and not self.embeddings):
            return None
        try:
            layout = self.format.for_columns(columns) if rule is None else parse_layout(rule, columns)
            layout.check_groups()
            return _looked_up_or_not(layout, kind)
        except FormatError as error:
            raise FormatError(f"{name}: {error}, or add it to keep") from error

    def _planned(self, name: str, columns: int, kind: str) -> Layout:
        try:
            layout = parse_layout(self.plan[name], columns)
            layout.check_groups()
            return _looked_up_or_not(layout, kind)
        except FormatError as error:
            raise FormatError(f"{name}: {error}") from error

    @property
    def needs_plan(self) -> bool:
        """Whether a budget is to be spent that has not been yet."""
        return bool(self.budget.given) and not self.plan

    @property
    def sorts_columns(self) -> bool:
        """Whether columns are sorted, or will be: that takes statistics of their inputs, whatever the quantizer is."""
        return (self.needs_plan and self.allocate.unit == "columns") or any(map(is_permuted, self.plan.values()))

    def rule_for(self, name: str) -> str | None:
        """The format (or ``keep``) of the first rule that matches a tensor's name, or None."""
        return next((r.format for r in self.rules if fnmatch.fnmatchcase(name, r.match)), None)

    def keeps(self, name: str) -> bool:
        """Whether a pattern of ``keep`` matches a tensor's name."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.keep)

    def for_device(self, device: torch.device) -> Recipe:
        """The recipe with ``calibration.dtype = "auto"`` settled, so that what is recorded is what was computed."""
        if self.calibration.dtype != "auto":
            return self
        if device.type == "cpu":
            able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
            native = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
        else:
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        calibration = self.calibration.model_copy(update={"dtype": "bfloat16" if native else "float32"})
        return self.model_copy(update={"calibration": calibration})

    def to_toml(self) -> str:
        return tomli_w.dumps(self.model_dump(exclude_none=True))

    @property
    def fingerprint(self) -> str:
        """sha256 of everything in the recipe that can change a number."""
        data = self.model_dump(exclude={"name", "description"}) | {"refine_order": list(self.refine)}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _looked_up_or_not(layout: Layout, kind: str) -> Layout:
    """The layout, unless it is one that an embedding cannot have; raises FormatError."""
    if kind == "embedding" and layout.permuted:
        raise FormatError(f"got {layout_name(layout)}, an embedding has no input to sort its columns by; give it a "
                          "layout without perm:")
    if kind == "embedding" and layout.whole:
        raise FormatError(f"got {layout_name(layout)}, an embedding is looked up row by row and its rows are coded "
                          "together; give it an integer format")
    return layout


def recipe_names() -> list[str]:
    """Names of the recipes shipped with fewbits."""
    folder = resources.files("fewbits.configs") / "recipes"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """The TOML of a shipped recipe, or of a file.

    Raises:
        RecipeError: no such recipe and no such file.
    """
    if name in recipe_names():
        return (resources.files("fewbits.configs") / "recipes" / f"{name}.toml").read_text()
    if Path(name).suffix == ".toml":
        if not Path(name).is_file():
            raise RecipeError(f"recipe: no file {name}")
        return Path(name).read_text()
    raise RecipeError(f"recipe: got {name!r}, {nearest(name, recipe_names())} (or give a .toml file)")


def load_recipe(name: str, overrides: Mapping[str, Any] | None = None) -> Recipe:
    """A shipped recipe by name, or one from a TOML file, with dotted keys overridden (``calibration.samples``).

    Raises:
        RecipeError: unknown recipe, bad TOML, an unknown key (the nearest one is suggested), a bad value.
    """
    try:
        data = tomllib.loads(recipe_text(name))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"recipe {name}: not TOML: {error}") from error
    data.setdefault("name", Path(name).stem)
    chosen = data.get("format")
    layout = chosen.get("layout") if isinstance(chosen, dict) else None
    for key, value in (overrides or {}).items():
        if layout and key.startswith("format.") and key not in ("format.layout", "format.row_weights"):
            raise RecipeError(f"{key}: got {value!r}, the recipe has format.layout = {layout!r}; name the bits and "
                              "groups there, e.g. --set format.layout=nf4_g64")
        table = data
        *path, leaf = key.split(".")
        for part in path:
            table = table.setdefault(part, {})
            if not isinstance(table, dict):
                raise RecipeError(f"{key}: {part} is a value, not a table")
        table[leaf] = value
    return parse_recipe(data)


def parse_recipe(data: Mapping[str, Any]) -> Recipe:
    """Validate recipe data. Raises RecipeError."""
    _reject_unknown(data, Recipe, "")
    try:
        recipe = Recipe.model_validate(data)
    except pydantic.ValidationError as error:
        raise _readable(error, "") from error
    options = asdict(recipe.make_quantizer())  # type: ignore[call-overload]
    refine = {name: asdict(refiner) for name, refiner in recipe.make_refiners().items()}
    recipe = recipe.model_copy(update={"quantizer": {"name": recipe.quantizer["name"], **options}, "refine": refine})
    for rule in recipe.rules:
        if rule.format != "keep":
            parse_format(rule.format)
    if recipe.format.layout:
        try:
            resolve_layout(recipe.format.layout, _ANY_COLUMNS)
        except FormatError as error:
            raise RecipeError(f"format.layout: {error}") from error
    return recipe


_ANY_COLUMNS = 1 << 13
"""K of a tensor that any layout without column counts fits, to check its name by."""


def _made(cls: type, name: str, options: Mapping[str, Any], path: str) -> Any:
    """The frozen dataclass ``cls`` with ``options``; raises RecipeError for an unknown one or a bad value."""
    known = [f.name for f in fields(cls)]
    for key in options:
        if key not in known:
            raise RecipeError(f"{path}{key}: {name} has no such option; {nearest(key, known)}")
    try:
        # as JSON, because strict Python input would have to be an instance already
        return pydantic.TypeAdapter(cls).validate_json(json.dumps(options, default=str), strict=True)
    except pydantic.ValidationError as error:
        raise _readable(error, path) from error


def parse_settings(settings: Iterable[str]) -> dict[str, Any]:
    """``["quantizer.damp=0.05", ...]`` to a dictionary; values are TOML, and bare words are strings.

    Raises:
        RecipeError: an item without ``=``.
    """
    out: dict[str, Any] = {}
    for item in settings:
        key, eq, value = item.partition("=")
        if not eq or not key.strip():
            raise RecipeError(f"--set: got {item!r}, needed key=value, e.g. calibration.samples=256")
        try:
            out[key.strip()] = tomllib.loads(f"v = {value}")["v"]
        except tomllib.TOMLDecodeError:
            out[key.strip()] = value.strip()
    return out


def _reject_unknown(data: Mapping[str, Any], model: type[BaseModel], prefix: str) -> None:
    tables: dict[str, type[BaseModel]] = {
        "format": Weights, "calibration": Calibration, "budget": Budget, "allocate": Allocate,
    }
    for key, value in data.items():
        if key not in model.model_fields:
            raise RecipeError(f"{prefix}{key}: unknown recipe key; {nearest(key, list(model.model_fields))}")
        if model is Recipe and key in tables and isinstance(value, Mapping):
            _reject_unknown(value, tables[key], f"{key}.")
        if model is Recipe and key == "rules" and isinstance(value, list):
            for i, rule in enumerate(value):
                if isinstance(rule, Mapping):
                    _reject_unknown(rule, Rule, f"rules.{i}.")


def _readable(error: pydantic.ValidationError, prefix: str) -> RecipeError:
    first = error.errors()[0]
    where = prefix + ".".join(str(p) for p in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    return RecipeError(f"{where}: got {first['input']!r}, {reason[0].lower()}{reason[1:]}")

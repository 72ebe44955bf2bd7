"""Which layout each tensor gets, and what is stored for the tensors that get none."""

from __future__ import annotations

import functools
import json
import logging
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fewbits.quant.errors import RecipeError
from fewbits.quant.formats import layout_name
from fewbits.quant.recipe import Recipe
from fewbits.quant.targets import Target
from fewbits.quant.types import LayerStats, Layout, QuantizedTensor, Stored, proxy_loss

if TYPE_CHECKING:
    from fewbits.calibration.block import Block
    from fewbits.calibration.stream import StreamedModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assignment:
    """Layouts by target name; a target that is not in ``layouts`` stays dense.

    Attributes:
        outside_names: targets outside the decoder blocks.
        shared: tables whose codes a tied head reads.
    """

    layouts: dict[str, Layout]
    targets: dict[str, Target]
    outside_names: tuple[str, ...]
    shared: frozenset[str] = frozenset()

    def is_multiplied(self, target: Target) -> bool:
        """Whether a product with hidden states reads these codes, be it through a head that is tied to them."""
        return target.kind != "embedding" or target.name in self.shared

    def by_layout(self, group: Iterable[str]) -> dict[Layout, list[str]]:
        """Those of a group that are quantized, by layout: rows of one layout and one input can be swept as one."""
        out: dict[Layout, list[str]] = {}
        for name in group:
            if name in self.layouts:
                out.setdefault(self.layouts[name], []).append(name)
        return out

    def outside(self) -> list[tuple[Target, Layout]]:
        """Quantized targets outside the decoder blocks: head and embeddings, where the recipe says so."""
        return [(self.targets[n], self.layouts[n]) for n in self.outside_names if n in self.layouts]

    def pack(self, tensors: Mapping[str, QuantizedTensor]) -> dict[str, Tensor]:
        """Tensors to store, under their full names."""
        return {f"{name}.{local}": t for name, tensor in tensors.items() for local, t in tensor.pack().items()}

    def unpack(self, names: Iterable[str], stored: Mapping[str, Tensor]) -> dict[str, QuantizedTensor]:
        """Those of ``names`` that are quantized, from their shard."""
        local: dict[str, dict[str, Tensor]] = {}
        for key, tensor in stored.items():
            name, _, rest = key.rpartition(".")
            local.setdefault(name, {})[rest] = tensor
        return {n: QuantizedTensor.unpack(local.get(n, {}), self.layouts[n]) for n in names if n in self.layouts}

    def dense(self, streamed: StreamedModel, block: Block | None) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
        """What is stored as it is: every tensor of a block (None: outside the blocks) that is not quantized."""
        index = None if block is None else block.index
        tensors = dict(streamed.dense_tensors(block, self._replaced(streamed, index)))
        infos = [(name, tuple(t.shape), t.dtype) for name, t in tensors.items()]
        return tensors, [self._dense_fact(name, shape, dtype, index) for name, shape, dtype in infos]

    def _replaced(self, streamed: StreamedModel, index: int | None) -> set[str]:
        """Parameters of a block that codes stand for."""
        return {
            f"{t.module_path}.{t.param_name}" for n, t in self.targets.items()
            if n in self.layouts and streamed.block_index(n) == index
        }

    def _dense_fact(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, index: int | None) -> dict[str, Any]:
        target = self._matrices.get(name)
        return {
            "name": target.name if target and target.expert_index is None else name,
            "shape": list(shape), "format": str(dtype).removeprefix("torch."),
            "bits_per_weight": 8.0 * dtype.itemsize, "bytes": math.prod(shape) * dtype.itemsize,
            "linear": target is not None and target.kind != "embedding" and index is not None,
        }

    @functools.cached_property
    def _matrices(self) -> dict[str, Target]:
        return {f"{t.module_path}.{t.param_name}": t for t in self.targets.values()}

    def shards(self, streamed: StreamedModel) -> list[Stored]:
        """Shape and dtype of every tensor of every shard: what lies outside the blocks first, then block by block."""
        out = []
        for index in [None, *range(len(streamed.block_modules))]:
            entries = {n: (s, d) for n, s, d in streamed.dense_infos(index, self._replaced(streamed, index))}
            for name, layout in self.layouts.items():
                if streamed.block_index(name) == index:
                    stored = layout.storage(self.targets[name].shape[0])
                    entries |= {f"{name}.{local}": info for local, info in stored.items()}
            out.append(entries)
        return out

    def facts(self, streamed: StreamedModel) -> list[dict[str, Any]]:
        """What the plan records of every tensor, before any is made: all but the losses."""
        out = []
        for index in [None, *range(len(streamed.block_modules))]:
            for name, layout in self.layouts.items():
                if streamed.block_index(name) == index:
                    out.append(format_fact(name, self.targets[name].shape, layout, linear=index is not None))
            infos = streamed.dense_infos(index, self._replaced(streamed, index))
            out += [self._dense_fact(name, shape, dtype, index) for name, shape, dtype in infos]
        return out


def assign(recipe: Recipe, streamed: StreamedModel) -> Assignment:
    """The recipe's layout for every target of a model.

    Raises:
        FormatError: a layout does not fit a tensor, or sorts the columns of an embedding.
        RecipeError: nothing is left to quantize, or experts of one layer are partly kept.
    """
    layouts: dict[str, Layout] = {}
    targets, ends = streamed.targets, ends_of(streamed)
    for name, target in targets.items():
        inside = streamed.block_index(name) is not None
        if not inside and name not in ends:
            continue  # projections around the blocks (e.g. OPT-350m's) are small and stay as they are
        if inside and target.kind == "embedding":
            continue
        is_head = name in ends and target.kind != "embedding"
        layout = recipe.layout_for(name, target.shape[1], kind=target.kind, is_head=is_head)
        if layout is not None:
            layouts[name] = layout
    if not layouts:
        raise RecipeError(f"keep: leaves nothing to quantize of {len(targets)} tensors; keep fewer")
    shared = _share_tied(layouts, streamed)
    _require_whole_experts(layouts, targets)
    outside = tuple(n for n in targets if streamed.block_index(n) is None)
    return Assignment(layouts, targets, outside, shared)


def ends_of(streamed: StreamedModel) -> list[str]:
    """The targets that are the model's input embedding and its output head."""
    modules = [streamed.model.get_input_embeddings(), streamed.model.get_output_embeddings()]
    return [n for n, t in streamed.targets.items()
            if streamed.block_index(n) is None and streamed.model.get_submodule(t.module_path) in modules]


def _share_tied(layouts: dict[str, Layout], streamed: StreamedModel) -> frozenset[str]:
    """Tables that are stored once for themselves and a tied head: it reads their codes, unless it has its own layout.

    Raises:
        RecipeError: the head is of a kind that cannot.
    """
    shared = set()
    for name, twin in ((n.rpartition(".")[0], t.rpartition(".")[0]) for n, t in streamed.tied.items()):
        if twin in layouts and layouts.get(name, layouts[twin]) == layouts[twin]:
            layouts.pop(name, None)
            shared.add(twin)
            if type(head := streamed.model.get_submodule(name)) is not nn.Linear:
                raise RecipeError(f"embeddings: {twin} is tied to {name}, a {type(head).__name__} that cannot read "
                                  "packed weights; add it to keep")
    return frozenset(shared)


def _require_whole_experts(quantized: Collection[str], targets: Mapping[str, Target]) -> None:
    for name, target in targets.items():
        if target.kind == "expert" and (name in quantized) != (f"{name.rpartition('.')[0]}.0" in quantized):
            raise RecipeError(f"keep: {name}: the experts of a layer are stored as one; keep all of them or none")


def format_fact(name: str, shape: tuple[int, int], layout: Layout, *, linear: bool) -> dict[str, Any]:
    """Name, format and stored bytes of a tensor that is or will be quantized."""
    nbytes = layout.stored_bytes(shape[0])
    return {
        "name": name, "shape": list(shape), "format": layout_name(layout),
        "bits_per_weight": 8 * nbytes / math.prod(shape), "bytes": nbytes, "linear": linear,
    }


def tensor_fact(
    name: str, weight: Tensor, tensor: QuantizedTensor, stats: LayerStats | None, extra: Mapping[str, float],
    *, linear: bool = True,
) -> dict[str, Any]:
    """What the plan records of a quantized tensor."""
    fact = format_fact(name, tensor.shape, tensor.layout, linear=linear)
    if stats is not None:
        fact["proxy_loss"], fact["relative_loss"] = proxy_loss(weight, tensor, stats)
        fact["n_tokens"] = stats.n_tokens
    else:
        weight = weight.float()
        error = weight - tensor.dequantize()
        fact["relative_loss"] = float(error.square().sum() / weight.square().sum().clamp(min=1e-30))
    return fact | dict(extra)


def quantization_config(facts: Iterable[Mapping[str, Any]], assignment: Assignment) -> dict[str, Any]:
    """``quantization_config`` of config.json: a default format, exceptions by exact name, and what is kept."""
    formats = {f["name"]: f["format"] for f in facts if f["name"] in assignment.layouts}
    linears = {n: f for n, f in formats.items() if assignment.targets[n].kind != "embedding"}
    default = Counter(linears.values()).most_common(1)[0][0] if linears else next(iter(formats.values()))
    keep = [n for n, t in assignment.targets.items() if n not in assignment.layouts and t.kind != "embedding"]
    exceptions = {
        n: f for n, f in formats.items() if f != default or assignment.targets[n].kind == "embedding"
    }
    return {
        "quant_method": "fewbits", "format_version": 1, "default": default,
        "exceptions": dict(sorted(exceptions.items())), "keep": sorted(keep),
    }


def plan_json(recipe: Recipe, facts: list[dict[str, Any]], refined: list[dict[str, Any]]) -> str:
    """plan.json: every tensor, its format and what it cost; to be read, diffed and edited; and what refiners did."""
    refined = [{k: v for k, v in r.items() if k != "seconds"} for r in refined]  # equal runs write equal files
    plan = {"version": 1, "recipe": recipe.name, "tensors": facts} | ({"refined": refined} if refined else {})
    return json.dumps(plan, indent=1) + "\n"


def totals(facts: Iterable[Mapping[str, Any]]) -> tuple[float, float]:
    """``(bits per weight over the linears of the decoder blocks, over everything)``, from stored bytes."""
    facts = list(facts)
    linears = [f for f in facts if f["linear"]]

    def bits(rows: list[Mapping[str, Any]]) -> float:
        return 8 * sum(f["bytes"] for f in rows) / max(sum(math.prod(f["shape"]) for f in rows), 1)

    return bits(linears), bits(facts)

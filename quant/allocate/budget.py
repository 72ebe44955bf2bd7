"""Budgets in bytes: what the user allows, less what is spent whatever the formats are."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from fewbits.calibration.stream import StreamedModel
from fewbits.quant.architecture import auto_class
from fewbits.quant.checkpoint import file_sizes
from fewbits.quant.errors import BudgetError
from fewbits.quant.plan import Assignment, totals
from fewbits.quant.recipe import Budget
from fewbits.quant.types import Layout

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(text: str, flag: str = "--size") -> int:
    """``90MB``, ``1.5 GiB``, ``123456``: bytes.

    Raises:
        BudgetError: not a size.
    """
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not m or m[2].upper() not in _UNITS or float(m[1]) <= 0:
        raise BudgetError(f"{flag}: got {text!r}, needed a size such as 90MB or 1.5GiB (MB = 10^6 bytes, MiB = 2^20)")
    return int(float(m[1]) * _UNITS[m[2].upper()])


@dataclass(frozen=True)
class Footprint:
    """Bytes of memory that running a model takes.

    Attributes:
        weights: everything stored, as loaded.
        kv_cache: keys and values (or whatever state the model keeps) at full context.
        activations: an estimate of the largest moment of a forward pass over one chunk of the prompt.
    """

    weights: int
    kv_cache: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.activations


class Measure:
    """What an assignment costs in the unit of a budget, and the budget: both in bytes.

    Bits per weight become bytes by the number of weights they are over, so all four kinds are one comparison.
    """

    def __init__(self, budget: Budget, streamed: StreamedModel) -> None:
        self.budget, self._streamed = budget, streamed
        (self.kind,) = budget.given or ["none"]
        self._running = running_bytes(streamed, budget.ctx, budget.batch) if self.kind == "fits_in" else (0, 0)

    def cost(self, assignment: Assignment) -> int:
        """Bytes that count against the budget."""
        if self.kind == "size":
            return sum(file_sizes(assignment.shards(self._streamed)))
        facts = assignment.facts(self._streamed)
        return sum(f["bytes"] for f in facts if f["linear"] or self.kind != "bpw") + sum(self._running)

    def limit(self, assignment: Assignment) -> int:
        """Bytes allowed."""
        if self.kind in ("size", "fits_in"):
            return int(getattr(self.budget, self.kind))
        facts = [f for f in assignment.facts(self._streamed) if f["linear"] or self.kind != "bpw"]
        weights = sum(math.prod(f["shape"]) for f in facts)
        return int(getattr(self.budget, self.kind) * weights / 8)

    def footprint(self, assignment: Assignment) -> Footprint:
        facts = assignment.facts(self._streamed)
        return Footprint(sum(f["bytes"] for f in facts), *self._running)

    def refuse(self, smallest: Assignment) -> None:
        """Raise BudgetError where even the smallest assignment costs too much, saying what is reachable."""
        cost, limit = self.cost(smallest), self.limit(smallest)
        if cost <= limit:
            return
        blocks, everything = totals(smallest.facts(self._streamed))
        flag = "--" + self.kind.replace("_", "-")
        way_out = "offer smaller --formats"
        if not any(self._streamed.targets[n].kind == "embedding" for n in smallest.layouts):
            way_out += ", or --set embeddings=true"
        if self.kind == "bpw":
            raise BudgetError(f"{flag}: got {self.budget.bpw:g}, the smallest that is reachable is {_up(blocks)}; "
                              "offer smaller --formats, or keep fewer tensors dense")
        if self.kind == "bpw_total":
            raise BudgetError(f"{flag}: got {self.budget.bpw_total:g}, the smallest that is reachable is "
                              f"{_up(everything)}; {way_out}")
        what = f", of which {sum(self._running)} for the KV cache and activations" if sum(self._running) else ""
        raise BudgetError(f"{flag}: got {limit} bytes, the smallest that is reachable is {cost}{what}; {way_out}"
                          f"{', or shorten the context' if what else ''}")


def _up(bits: float) -> float:
    """Three digits, rounded up, so that what is said can be asked for."""
    return -(-bits * 1000 // 1) / 1000


def running_bytes(streamed: StreamedModel, ctx: int, batch: int) -> tuple[int, int]:
    """``(KV cache, activations)`` of generating with this context, in the model's dtype.

    The cache is made by the model itself, on the meta device, from the whole context: so sliding windows, shared keys
    and recurrent states count what they take. Activations are those of a prompt read at once: the widest layer's
    inputs and outputs, the residual stream, and the logits of the last token. Images count as their tokens; what a
    vision tower holds while it looks at one is left out.
    """
    from accelerate import init_empty_weights

    config = copy.deepcopy(streamed.model.config)
    text = config.get_text_config()
    config.use_cache = text.use_cache = True
    config.pad_token_id = text.pad_token_id = None  # no padding to look for: these tokens have no values
    with init_empty_weights():
        model = auto_class(config).from_config(config, dtype=streamed.model.dtype).eval()
    ids = torch.zeros(batch, ctx, dtype=torch.int64, device="meta")
    with torch.no_grad(), torch.device("meta"):
        out = model.to("meta")(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache = sum(t.numel() * t.element_size() for t in _tensors(out.past_key_values))
    item = streamed.model.dtype.itemsize
    inside = [t.shape for n, t in streamed.targets.items() if streamed.block_index(n) is not None]
    widest = max((n + k for n, k in inside), default=0)
    hidden = min((min(n, k) for n, k in inside), default=0)
    vocabulary = streamed.model.get_input_embeddings().weight.shape[0]
    return cache, batch * (ctx * (widest + 3 * hidden) * item + vocabulary * 4)


def _tensors(value: Any, seen: set[int] | None = None) -> list[torch.Tensor]:
    """Every tensor that a cache holds, wherever it keeps it."""
    seen = set() if seen is None else seen
    if value is None or id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v, seen)]
    if isinstance(value, (list, tuple)):
        return [t for v in value for t in _tensors(v, seen)]
    return [t for v in vars(value).values() for t in _tensors(v, seen)] if hasattr(value, "__dict__") else []


def smallest(menu: Mapping[str, Mapping[str, Layout]], base: Assignment) -> Assignment:
    """Every tensor at the cheapest entry of its menu."""
    cheapest = {}
    for name, entries in menu.items():
        rows = base.targets[name].shape[0]
        cheapest[name] = min(entries.values(), key=lambda layout, n=rows: layout.stored_bytes(n))  # type: ignore[misc]
    return replace(base, layouts={**base.layouts, **cheapest})

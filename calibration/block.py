"""One decoder block in memory: run it, watch what its linears read, put quantized weights into it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.calibration.stats import InputTap, OnInput
from fewbits.quant.errors import ModelError
from fewbits.quant.targets import Target, as_matrix, read_weight


@dataclass
class Call:
    """What a block is called with beside the hidden states: recorded once, replayed for every pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Block:
    """A decoder block in memory.

    Attributes:
        targets: what can be quantized in it, in module order.
        weights: the original weights ``(N, K)`` of the targets, in the dtype of the source. Where that is the compute
            dtype they are the module's own, and :meth:`install` overwrites them.
        converted: tensors that transformers merged or split on loading, by module tree name.
    """

    name: str
    index: int
    module: nn.Module
    targets: list[Target]
    weights: dict[str, Tensor]
    converted: dict[str, Tensor]
    model: nn.Module
    _groups: list[list[str]] | None = field(default=None, repr=False)

    def run(self, hidden: Tensor, call: Call, module: nn.Module | None = None) -> Tensor:
        """The block's output for hidden states ``(B, L, d)``."""
        with torch.no_grad():
            out = (module or self.module)(hidden, *call.args, **call.kwargs)
        return out[0] if isinstance(out, tuple) else out

    def install(self, name: str, dense: Tensor) -> None:
        """Put a weight ``(N, K)`` in place of a target's, in the compute dtype."""
        target = next(t for t in self.targets if t.name == name)
        read_weight(self.model, target).copy_(dense)

    def original(self) -> nn.Module:
        """A copy of the module as it is now (before anything is installed)."""
        return copy.deepcopy(self.module)

    def weights_of(self, module: nn.Module) -> dict[str, Tensor]:
        """The targets' weights ``(N, K)`` in a copy of the module: views, in its dtype."""
        out = {}
        for t in self.targets:
            owner = module.get_submodule(t.module_path[len(self.name) + 1 :]) if t.module_path != self.name else module
            out[t.name] = as_matrix(getattr(owner, t.param_name).detach(), t)
        return out

    def _watched(self, module: nn.Module) -> dict[int, str]:
        return {weight.data_ptr(): name for name, weight in self.weights_of(module).items()}

    def shared_inputs(self, hidden: Tensor, call: Call) -> list[list[str]]:
        """Targets grouped by the tensor that they read, in the order in which they are called.

        Experts that see no token of this batch come last, each by itself.
        """
        if self._groups is None:
            groups: dict[int, list[str]] = {}
            keep: list[Tensor] = []  # ids are unique only among tensors that are alive

            def see(name: str, x: Tensor, tokens: Tensor) -> None:
                keep.append(x)
                group = groups.setdefault(id(x), [])
                if name not in group:
                    group.append(name)

            self.watch(hidden, call, see)
            seen = {n for g in groups.values() for n in g}
            unseen = [t.name for t in self.targets if t.name not in seen]
            for t in self.targets:
                if t.name in unseen and t.kind != "expert":
                    raise ModelError(f"{t.name}: the block never multiplies by it in a way that can be seen; keep it")
            self._groups = [*groups.values(), *([n] for n in unseen)]
        return self._groups

    def watch(self, hidden: Tensor, call: Call, on_input: OnInput, module: nn.Module | None = None) -> Tensor:
        """The block's output, with ``on_input(name, x, tokens)`` called for every target before it multiplies ``x``."""
        experts = {t.name for t in self.targets if t.kind == "expert"}
        with InputTap(
            self._watched(module or self.module), on_input, hidden.shape[0] * hidden.shape[1], routed=experts
        ):
            return self.run(hidden, call, module)

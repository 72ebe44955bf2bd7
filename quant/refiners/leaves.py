"""The dense weights that a model computes with while what is stored moves behind them.

A backward pass leaves a gradient in each; every quantized tensor makes of its own what it can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewbits.quant.refiners.tunable import Free, Tunable
from fewbits.quant.targets import Target, as_matrix, read_weight
from fewbits.quant.types import QuantizedTensor


class Leaves:
    """Parameters of ``model`` and what moves them.

    Args:
        targets: by name, those of ``tunables`` and maybe others.
        tunables: what stands behind a target's weight.
        plain: what stands behind a parameter that is stored as it is, by its name.
    """

    def __init__(
        self, model: nn.Module, targets: Mapping[str, Target], tunables: Mapping[str, Tunable],
        plain: Mapping[str, Free] | None = None,
    ) -> None:
        self._model: Any = model
        self._targets = {name: targets[name] for name in tunables}
        self.tunables, self.plain = dict(tunables), dict(plain or {})
        found = [*map(self._parameter, self._targets), *map(self._model.get_parameter, self.plain)]
        self._parameters = list({id(p): p for p in found}.values())  # experts share one

    def _parameter(self, name: str) -> nn.Parameter:
        target = self._targets[name]
        return self._model.get_parameter(f"{target.module_path}.{target.param_name}")

    def watch(self, gradients: bool) -> None:
        """Whether passes are to leave gradients; those that there are go."""
        for parameter in self._parameters:
            parameter.requires_grad_(gradients)
            parameter.grad = None

    @torch.no_grad()
    def install(self, tensors: Mapping[str, QuantizedTensor], plain: Mapping[str, Tensor] | None = None) -> None:
        """Compute with these."""
        for name, tensor in tensors.items():
            read_weight(self._model, self._targets[name]).copy_(tensor.dequantize())
        for name, value in (plain or {}).items():
            self._model.get_parameter(name).detach().copy_(value)

    @torch.no_grad()
    def anneal(self, progress: float) -> None:
        """Compute with what moves, once the share ``progress`` of the steps is done."""
        for name, tunable in self.tunables.items():
            tunable.anneal(progress)
            read_weight(self._model, self._targets[name]).copy_(tunable.dense())
        self.install({}, {name: free.value() for name, free in self.plain.items()})

    def gradients(self) -> Iterator[Tensor]:
        """Of every parameter; zeros where the last passes left none."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            yield parameter.grad

    def step(self, *, rate: float, code_rate: float, most: float = 1.0) -> None:
        """Move everything down its gradient, which is forgotten; see :meth:`Tunable.step`."""
        for name, tunable in self.tunables.items():
            if (gradient := self._parameter(name).grad) is not None:  # an expert that no token went to has none
                tunable.step(as_matrix(gradient, self._targets[name]), rate=rate, code_rate=code_rate, most=most)
        for name, free in self.plain.items():
            if (gradient := self._model.get_parameter(name).grad) is not None:
                free.change.grad = gradient.float() * free.unit
                free.step(rate)
        for parameter in self._parameters:
            parameter.grad = None

    def stored(self) -> tuple[dict[str, QuantizedTensor], dict[str, Tensor]]:
        """What it all is now, as it is stored."""
        return {n: t.frozen() for n, t in self.tunables.items()}, {n: f.stored() for n, f in self.plain.items()}

    def state(self) -> dict[str, Tensor]:
        """Everything that moves, by name."""
        movers: dict[str, Tunable | Free] = {**self.tunables, **self.plain}
        return {f"{name}/{k}": v for name, each in movers.items() for k, v in each.state().items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Inverse of :meth:`state`."""
        own: dict[str, dict[str, Tensor]] = {}
        for key, value in state.items():
            name, _, rest = key.rpartition("/")
            own.setdefault(name, {})[rest] = value
        for name, tunable in self.tunables.items():
            tunable.restore(own.get(name, {}))
        for name, free in self.plain.items():
            free.restore(own[name])

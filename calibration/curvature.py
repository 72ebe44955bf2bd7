"""What a model's output thinks of an error: gradients of the whole model, with labels that it draws itself.

With labels sampled from the model's own distribution, the mean squared gradient of the log-likelihood is the Fisher
information, which is the curvature of KL(model || changed model) at no change. So for an error ``E`` of a weight, with
``x`` its input and ``g`` the gradient at its output,

    KL per token  ~  1/2 E[(g^T E x)^2]  ~  1/2 sum_i c_i (E H E^T)_ii,     c_i = E[g_i^2],  H = E[x x^T]

which takes rows of ``E`` as uncorrelated, and ``g`` and ``x`` as independent (K-FAC, arXiv 1503.05671, its diagonal).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fewbits.quant.targets import Target, read_weight

Progress = Callable[[str, int, int], None]

CURVATURE_ROWS = 16
"""Calibration rows that gradients are taken over: changes numbers by their noise."""


class OutputTap(TorchFunctionMode):
    """While active, calls ``on_output(name, y)`` after a product with a watched weight, found as in ``InputTap``."""

    def __init__(self, watched: dict[int, str], on_output: Callable[[str, Tensor], None]) -> None:
        super().__init__()
        self._watched, self._on_output = watched, on_output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        y = func(*args, **(kwargs or {}))
        weight = args[1] if func is F.linear else args[2] if func is torch.addmm else None
        if weight is not None and (name := self._watched.get(weight.data_ptr())) is not None:
            self._on_output(name, y)
        return y


def output_curvature(
    model: Any, targets: Iterable[Target], rows: Sequence[Tensor], *, seed: int = 0, progress: Progress | None = None
) -> dict[str, Tensor]:
    """``c_i = E[g_i^2]`` per output row of each target: name -> ``(N,)`` float32, nats^2 per unit^2, over all tokens.

    Args:
        model: a dense transformers model.
        rows: token ids ``(T,)`` of each sequence; each costs a forward and a backward pass (no weight gradients).
    """
    sums: dict[str, Tensor] = {}
    watched = {}
    for target in targets:
        weight = read_weight(model, target)
        watched[weight.data_ptr()] = target.name
        sums[target.name] = torch.zeros(weight.shape[0], device=weight.device)

    def see(name: str, y: Tensor) -> None:
        def add(gradient: Tensor) -> None:
            sums[name] += gradient.float().flatten(0, -2).square().sum(0)

        y.register_hook(add)

    tokens = 0
    with _gradients_of_activations(model):
        for i, row in enumerate(rows):
            with OutputTap(watched, see):
                logits = model(row[None].to(model.device), use_cache=False).logits[0].float()
            draw = torch.Generator(device=logits.device).manual_seed(seed * 1_000_003 + i)
            labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=draw)[:, 0]
            F.cross_entropy(logits, labels, reduction="sum").backward()
            tokens += len(row)
            if progress:
                progress("Gradients", i + 1, len(rows))
    return {name: total / tokens for name, total in sums.items()}


class _gradients_of_activations:
    """Inside, activations carry gradients and parameters do not."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __enter__(self) -> None:
        self._before = [(p, p.requires_grad) for p in self._model.parameters()]
        for p, _ in self._before:
            p.requires_grad_(False)
        embeddings = self._model.get_input_embeddings()
        self._hook = embeddings.register_forward_hook(lambda module, args, out: out.detach().requires_grad_())
        self._grad = torch.enable_grad()
        self._grad.__enter__()

    def __exit__(self, *exc: object) -> None:
        self._grad.__exit__(None, None, None)
        self._hook.remove()
        for p, needs in self._before:
            p.requires_grad_(needs)

"""One step of a block: the linears that are quantized with the same statistics behind them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fewbits.calibration.block import Block
from fewbits.quant.plan import Assignment, tensor_fact
from fewbits.quant.source import check_finite
from fewbits.quant.types import LayerStats, QuantizedTensor, Quantizer


def quantize_step(
    assignment: Assignment, quantizer: Quantizer, block: Block, step: Sequence[Sequence[str]],
    stats: dict[str, LayerStats], *, seed: int, curvature: Mapping[str, Tensor],
) -> tuple[dict[str, QuantizedTensor], list[dict[str, Any]]]:
    """Quantize the targets of each group that shares an input; those of one layout are stacked and swept as one.

    Args:
        stats: by the first name of each group; taken out as they are used, to free them.
        curvature: ``(N,)`` of the outputs of a target, by its name, where it is known.

    Returns:
        The tensors by name, and what the plan records of each.
    """
    made: dict[str, QuantizedTensor] = {}
    facts = []
    for group in step:
        own = stats.pop(group[0], None)
        for layout, names in assignment.by_layout(group).items():
            for name in names:
                check_finite(name, block.weights[name])
            for stack in [[n] for n in names] if layout.whole or not quantizer.stacks else [names]:
                weights = [block.weights[n] for n in stack]
                stacked = torch.cat(weights) if len(weights) > 1 else weights[0]
                seen = own
                if own is not None and len(stack) == 1:
                    seen = dataclasses.replace(own, curvature=curvature.get(stack[0]))
                whole, extra = quantizer.quantize(stacked, seen, layout, seed=seed)
                for name, weight, tensor in zip(stack, weights, whole.split_rows([len(w) for w in weights])):
                    made[name] = tensor
                    facts.append(tensor_fact(name, weight, tensor, own, extra))
    return made, facts

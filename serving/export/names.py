"""The names and shapes that a model has on the hub: other engines know no others.

transformers renames and merges weights while it loads them (the experts of a layer become one parameter), and fewbits
stores what it is then. Which rows of which matrix go where is asked of transformers itself: its own conversion is run
backwards over row numbers in place of weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from fewbits.quant.errors import FormatError
from fewbits.serving.export.stored import Stored


@dataclass(frozen=True)
class HubMatrix:
    """A matrix as the hub has it: some rows of one of ours.

    Attributes:
        name: module path on the hub, e.g. ``model.layers.0.mlp.experts.3.gate_proj``.
        of: the name of our matrix.
        rows: which of its rows; None: all, in order.
    """

    name: str
    of: str
    rows: Tensor | None


def hub_matrices(stored: Stored) -> list[HubMatrix]:
    """Every quantized matrix under the names of the hub, in the order of ours.

    Raises:
        FormatError: what the hub has is no choice of rows of one of our matrices.
    """
    owners: list[str] = []
    numbers: dict[str, list[Tensor]] = {}
    for name, (target, _) in stored.matrices.items():
        if target.kind == "conv1d":
            raise FormatError(f"{name}: is a transposed linear (transformers' Conv1D), which no engine reads packed; "
                              "use it with fewbits, or add it to keep")
        full = f"{target.module_path}.{target.param_name}"
        numbers.setdefault(full, []).append(_numbers(len(owners), target.shape[0]))
        owners.append(name)
    merged = {f"{t.module_path}.{t.param_name}" for t, _ in stored.matrices.values() if t.kind == "expert"}
    tensors = {full: torch.stack(parts) if full in merged else parts[0] for full, parts in numbers.items()}
    out = [_hub_matrix(name, found, owners, stored) for name, found in _reverted(stored, tensors).items()]
    order = {name: i for i, name in enumerate(owners)}
    return sorted(out, key=lambda m: order[m.of])


def hub_tensors(stored: Stored, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that are stored as they are, under the names of the hub, merged ones taken apart."""
    return {name: t.contiguous() for name, t in _reverted(stored, tensors).items()}


_ROWS = 1 << 32


def _numbers(owner: int, rows: int) -> Tensor:
    return (owner * _ROWS + torch.arange(rows)).unsqueeze(1)


def _reverted(stored: Stored, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return revert_weight_conversion(stored.model, dict(tensors))


def _hub_matrix(full: str, found: Tensor, owners: list[str], stored: Stored) -> HubMatrix:
    name = full.removesuffix(".weight")
    owner = owners[int(found.flatten()[0]) // _ROWS]
    rows = found.flatten() % _ROWS
    if found.ndim != 2 or found.shape[1] != 1 or bool((found // _ROWS != found[0] // _ROWS).any()):
        raise FormatError(f"{owner}: {full} on the hub is no choice of its rows; add it to keep")
    whole = torch.equal(rows, torch.arange(stored.matrices[owner][0].shape[0]))
    return HubMatrix(name, owner, None if whole else rows)


def hub_names(stored: Stored, names: Sequence[str]) -> list[str]:
    """Module paths under the names of the hub."""
    found = _reverted(stored, {f"{name}.weight": torch.zeros(1, 1) for name in names})
    return [name.removesuffix(".weight") for name in found]

"""A plain model: what the codes mean, as floats under the hub's names, for whatever reads the original.

Nothing gets smaller. It is the way to engines that read no packed layout, to other tools' merges and training, and to
quantizing again what was trained with codes in the loop.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from fewbits.quant.targets import Target, as_matrix
from fewbits.quant.types import Layout
from fewbits.serving.export.base import Progress, write_folder
from fewbits.serving.export.names import hub_tensors
from fewbits.serving.export.stored import Stored


class Dense:
    """Takes everything: any format, rotated or not, embeddings, experts, transposed linears."""

    single_file = False

    def obstacle(self, target: Target, layout: Layout) -> str | None:
        return None

    def write(self, stored: Stored, out: Path, progress: Progress) -> list[str]:
        dtype = stored.model.dtype  # config.json's, which the original is in
        owners: dict[str, list[str]] = {}  # experts share a parameter
        for name, (target, _) in stored.matrices.items():
            owners.setdefault(f"{target.module_path}.{target.param_name}", []).append(name)
        firsts = {names[0]: full for full, names in owners.items()}

        def tensors_of(names: list[str]) -> dict[str, Tensor]:
            """The parameters among these; a shared one is written where the first that shares it lies."""
            found = {name: stored.dense(name) for name in names if name not in stored.matrices}
            for full in (firsts[name] for name in names if name in firsts):
                found[full] = torch.empty(stored.model.get_parameter(full).shape, dtype=dtype)
                for name in owners[full]:
                    as_matrix(found[full], stored.matrices[name][0]).copy_(stored.read(name).dequantize())
            return hub_tensors(stored, found)

        write_folder(stored, out, None, tensors_of, progress)
        return [f"weights: rounded to {str(dtype).removeprefix('torch.')}, which config.json says that the model is in"]

"""Block-wise tuning of what is continuous, codes as they are: codebooks (AQLM, VPTQ), scales, means, rotations."""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.quant.refiners.block import BlockRefiner


@dataclass(frozen=True)
class Codebook(BlockRefiner):
    """The table ``[refine.codebook]``: that of :class:`BlockRefiner`."""

"""Tuning of norms and biases alone, by the end-to-end loss: weights stay as they are, to the last bit."""

from __future__ import annotations

from dataclasses import dataclass

from fewbits.quant.refiners.distill import Distill


@dataclass(frozen=True)
class Norms(Distill):
    """The table ``[refine.norms]``: that of :class:`Distill`."""

    weights: bool = False
    epochs: float = 0.25

"""The loss of a refiner as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw_curve(refined: Mapping[str, Any], path: Path) -> Path | None:
    """Loss by step, of batches and of held-out rows; None where matplotlib is not installed.

    Args:
        refined: as :meth:`~fewbits.quant.refiners.run.Refined.to_json` gives it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    curve = refined["curve"]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([s for s, *_ in curve], [loss for _, loss, _ in curve], alpha=0.5, label="batches")
    held = [(s, seen) for s, _, seen in curve if seen is not None]
    axes.plot([0, *(s for s, _ in held)], [refined["before"], *(seen for _, seen in held)], "o-", label="held-out text")
    axes.set(xlabel="step", ylabel="nats per token to the original", yscale="log", title=refined["refiner"])
    axes.legend()
    figure.savefig(path, dpi=120)
    return path

"""Errors that a user can cause. Each message names what is wrong: name, got, needed, way out."""

from __future__ import annotations

from typing import Any


class FewbitsError(ValueError):
    """Base of every error that bad input can cause; the command line turns it into exit code 2."""


class RecipeError(FewbitsError):
    """A recipe, or a flag that overrides it, is malformed or asks for something that does not exist."""


class FormatError(FewbitsError):
    """A format cannot hold the tensor it was asked to hold."""


class ModelError(FewbitsError):
    """The model to quantize cannot be read, or has nothing that can be quantized."""


class CheckpointError(FewbitsError):
    """A checkpoint on disk is missing, truncated, corrupt, hostile, or belongs to another run."""


class CalibrationError(FewbitsError):
    """Calibration data is missing, empty, or unusable."""


class BudgetError(FewbitsError):
    """A budget that cannot be met, or that makes no sense."""


class QualityGateError(FewbitsError):
    """The result misses a quality gate that the user set (exit code 3).

    Attributes:
        report: the report of the run that missed it.
    """

    def __init__(self, message: str, report: Any = None) -> None:
        super().__init__(message)
        self.report = report


def nearest(name: str, known: list[str]) -> str:
    """``"; did you mean 'x'?"`` for the closest of ``known``, or the list of them when nothing is close."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"

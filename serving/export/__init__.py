"""Exports: fewbits' codes in the layouts that other engines read, without rounding again. One file a target."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from fewbits.quant.card import write_card
from fewbits.quant.errors import RecipeError, nearest
from fewbits.serving.export.base import Exporter, ExportReport, Progress, require_exportable, staged, totals
from fewbits.serving.export.bitnet import BitNet
from fewbits.serving.export.compressed_tensors import CompressedTensors
from fewbits.serving.export.dense import Dense
from fewbits.serving.export.gguf import Gguf
from fewbits.serving.export.gptq import Gptq
from fewbits.serving.export.stored import open_stored

EXPORTS: dict[str, type[Exporter]] = {
    "bitnet": BitNet,
    "compressed-tensors": CompressedTensors,
    "dense": Dense,
    "gguf": Gguf,
    "gptq": Gptq,
}
"""The name of a target -> what writes it; its options are its fields."""

__all__ = ["EXPORTS", "ExportReport", "export"]


def export(
    directory: str | Path, out: str | Path, *, to: str, allow: Collection[str] = (), force: bool = False,
    progress: Progress | None = None,
) -> ExportReport:
    """Write a fewbits checkpoint in the layout of another engine; its integers stay as they are (of ``dense``: floats).

    Args:
        to: a name of :data:`EXPORTS`.
        allow: what the target refuses unless it is named, e.g. ``odd-bits``.
        force: replace an earlier export.

    Raises:
        RecipeError: unknown target, or nothing of that name to allow.
        FormatError: the target cannot take a tensor; names it, and the nearest choice that it takes.
        CheckpointError: the checkpoint is none, or ``out`` cannot be written.
    """
    exporter = make_exporter(to, allow)
    stored = open_stored(directory)
    require_exportable(stored, exporter, to)
    out = Path(out)
    with staged(out, single_file=exporter.single_file, force=force) as place:
        warnings = exporter.write(stored, place, progress or (lambda what, done, total: None))
        if not exporter.single_file:
            write_card(stored.path, place, layout=to)
    return ExportReport(str(out), to, totals(out), len(stored.matrices), warnings)


def make_exporter(to: str, allow: Collection[str] = ()) -> Exporter:
    """The exporter of a target with some options set."""
    if to not in EXPORTS:
        raise RecipeError(f"--to: got {to!r}, {nearest(to, list(EXPORTS))}")
    kind = EXPORTS[to]
    options = [f.replace("_", "-") for f in getattr(kind, "__dataclass_fields__", {})]
    for name in allow:
        if name not in options:
            known = f"{to} knows {', '.join(options)}" if options else f"{to} knows none"
            raise RecipeError(f"--allow: got {name!r}, {known}")
    return kind(**{name.replace("-", "_"): True for name in allow})

"""Reading what a finished checkpoint says of itself, checked against the bytes that are there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fewbits.quant.checkpoint import INDEX
from fewbits.quant.errors import CheckpointError
from fewbits.quant.plan import totals
from fewbits.quant.shards import read_header, read_json

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class Inspection:
    """Totals, tensors and provenance of a checkpoint.

    Attributes:
        tensors: one record a tensor: name, shape, format, bits_per_weight, proxy_loss (None where unknown), ...
        provenance: the lock: model and shard hashes, calibration fingerprint, seed, versions.
    """

    bits_per_weight: float
    bits_per_weight_total: float
    bytes: int
    tensors: list[dict[str, Any]]
    provenance: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def to_table(self) -> Table:
        """The quantized tensors and linears, for a terminal."""
        from rich.table import Table

        table = Table(
            title=f"{self.bits_per_weight:.3f} bits per weight in the decoder blocks, "
            f"{self.bits_per_weight_total:.3f} over all, {self.bytes / 1e6:.1f} MB"
        )
        for column, side in (("tensor", "left"), ("shape", "right"), ("format", "left"), ("bits", "right"),
                             ("relative loss", "right")):
            table.add_column(column, justify=side)  # type: ignore[arg-type]
        for t in self.tensors:
            if len(t["shape"]) >= 2:
                loss = "" if t.get("relative_loss") is None else f"{t['relative_loss']:.2e}"
                shape = " x ".join(map(str, t["shape"]))
                table.add_row(t["name"], shape, t["format"], f"{t['bits_per_weight']:.3f}", loss)
        return table


def inspect(directory: str | Path) -> Inspection:
    """Read plan, lock and the headers of all shards.

    Raises:
        CheckpointError: not a fewbits checkpoint, unfinished, or its plan does not account for the stored bytes.
    """
    path = Path(directory)
    if not (path / INDEX).is_file():
        unfinished = (path / ".fewbits").is_dir()
        what = "an unfinished run (quantize --resume continues it)" if unfinished else "no fewbits index"
        raise CheckpointError(f"{path}: holds {what}; name a directory that fewbits quantize has written")
    index, plan = read_json(path / INDEX), read_json(path / "plan.json")
    lock = read_json(path / "fewbits.lock")
    tensors = plan.get("tensors")
    shards = index.get("weight_map")
    if not isinstance(tensors, list) or not isinstance(shards, dict):
        raise CheckpointError(f"{path}: plan.json or {INDEX} is not what fewbits writes; quantize again")
    files = sorted({name for name in shards.values() if isinstance(name, str)})
    if any(Path(name).name != name for name in files):
        raise CheckpointError(f"{path}: {INDEX} names a file outside the directory; do not trust this checkpoint")
    stored = sum(entry.nbytes for name in files for entry in read_header(path / name).values())
    try:
        for t in tensors:
            t.setdefault("proxy_loss", None)
        planned = sum(t["bytes"] for t in tensors)
        per_weight, total = totals(tensors)
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: plan.json is not what fewbits writes ({error}); quantize again") from error
    if planned != stored:
        raise CheckpointError(
            f"{path}: plan.json accounts for {planned} bytes, the shards hold {stored}; quantize again"
        )
    return Inspection(per_weight, total, sum((path / n).stat().st_size for n in files), tensors, lock)



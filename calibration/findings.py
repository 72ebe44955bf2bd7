"""What a survey has found so far, kept beside the statistics it works from: an interrupted one goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewbits.quant.checkpoint import disk_errors
from fewbits.quant.formats import layout_name
from fewbits.quant.types import Layout


class Findings:
    """Numbers by kind, tensor and layout; one line of JSON each, appended as they are found.

    Args:
        folder: where they are kept; None keeps them in memory only.
        identity: what they depend on beyond the statistics of the folder. Those of another identity are left alone.
    """

    def __init__(self, folder: Path | None, identity: Mapping[str, Any]) -> None:
        self._key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        self._path = None if folder is None else folder / "findings.jsonl"
        self._known: dict[tuple[str, str, str], float] = {}
        if self._path is not None and self._path.exists():
            for line in self._path.read_text().splitlines():
                self._take(line)

    def _take(self, line: str) -> None:
        try:
            key, kind, tensor, layout, value = json.loads(line)
            if key == self._key:
                self._known[kind, tensor, layout] = float(value)
        except (ValueError, TypeError):  # a line that an interruption cut short
            return

    def get(self, kind: str, tensor: str, layout: Layout) -> float | None:
        """What is known, or None."""
        return self._known.get((kind, tensor, layout_name(layout)))

    def add(self, kind: str, tensor: str, layout: Layout, value: float) -> None:
        """Keep a number."""
        name = layout_name(layout)
        self._known[kind, tensor, name] = value
        if self._path is not None:
            with disk_errors(self._path), self._path.open("a") as file:
                file.write(json.dumps([self._key, kind, tensor, name, value]) + "\n")

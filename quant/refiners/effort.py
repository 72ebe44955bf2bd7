"""How much time refiners may take."""

from __future__ import annotations

from typing import Literal

Effort = Literal["fast", "normal", "best"]
EFFORTS: tuple[Effort, ...] = ("fast", "normal", "best")

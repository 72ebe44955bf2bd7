"""What formats that code each weight by itself have in common: groups of consecutive columns that share parameters."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewbits.quant.errors import FormatError
from fewbits.quant.types import Params


class ScalarFormat:
    """Codes of single weights, with parameters for each group of ``group_size`` columns (None: the whole row)."""

    group_size: int | None

    span: ClassVar[int] = 1
    width: ClassVar[int] = 1
    height: ClassVar[int] = 1
    depth: ClassVar[int] = 1
    rotated: ClassVar[bool] = False
    joint: ClassVar[bool] = False

    def groups(self, columns: int) -> int:
        size = self.group_size or columns
        if columns % size:
            divisors = [str(d) for d in (16, 32, 64, 96, 128, 192, 256) if columns % d == 0]
            hint = f"one that divides it ({', '.join(divisors)}) or " if divisors else ""
            raise FormatError(f"K = {columns} is not a multiple of group_size {size}; choose {hint}'row' or 'auto'")
        return columns // size

    def in_groups(self, size: int) -> Any:
        """The same with groups of ``size`` columns; a family with a size of its own keeps it."""
        return dataclasses.replace(self, group_size=size)  # type: ignore[type-var]

    def shared(self, weight: Tensor) -> dict[str, Tensor]:
        return {}

    def linear(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        """Free parameter -> what it is multiplied by, float32 shaped as ``codes``: values are the sum of the products.

        Empty where none is free to take any number.
        """
        return {}


def group_name(group_size: int | None) -> str:
    """``g64``, or ``row``."""
    return f"g{group_size}" if group_size else "row"


def storable(ideal: Tensor, dtype: torch.dtype, *, name: str = "scale") -> Tensor:
    """Scales above 0 as stored; those of all-zero groups become 1, so that they decode to exact zeros.

    Raises:
        FormatError: a scale is more than ``dtype`` holds.
    """
    limits = torch.finfo(dtype)
    if bool((ideal > limits.max).any()):
        raise FormatError(f"{name}: got {float(ideal.max()):.3g}, {dtype} holds at most {limits.max:.3g}; "
                          "set format.scale_dtype = 'bfloat16'")
    # subnormal scales are stored down to where five of their bits are left
    least = limits.smallest_normal / 32
    return torch.where(ideal > 0, ideal.clamp(min=least), torch.ones_like(ideal)).to(dtype)

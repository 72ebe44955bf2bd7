"""Random packed weights, one thread, and a ``torch.empty`` full of NaN so that nothing unwritten goes unnoticed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fewbits.kernels.dispatch import Operands
from fewbits.quant.formats.integer import IntFormat


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.empty`` returns NaN, or the largest integer."""
    empty = torch.empty

    def poisoned(*size, **kwargs) -> Tensor:
        out = empty(*size, **kwargs)
        return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

    monkeypatch.setattr(torch, "empty", poisoned)


Weight = tuple[IntFormat, dict[str, Tensor]]


@pytest.fixture
def weight() -> Callable[..., Weight]:
    """``weight(rows, columns, bits, group_size, ...)``: a format and random tensors as a checkpoint has them."""

    def make(rows: int, columns: int, bits: int, group_size: int | None, *, symmetric: bool = False,
             scale_dtype: torch.dtype = torch.float16, seed: int = 0) -> Weight:
        fmt = IntFormat(bits, group_size, symmetric, scale_dtype)
        gen = torch.Generator().manual_seed(seed)
        groups = fmt.groups(columns)
        codes = torch.randint(0, fmt.levels, (rows, columns), generator=gen, dtype=torch.uint8)
        params = {"scale": (torch.rand(rows, groups, generator=gen) + 0.5).to(scale_dtype)}
        if not symmetric:
            params["zero_point"] = torch.randint(0, fmt.levels, (rows, groups), generator=gen, dtype=torch.uint8)
        return fmt, fmt.pack(codes, params)

    return make


def error_bound(x: Tensor, exact: Tensor, operands: Operands, bits: int, dense: Tensor) -> Tensor:
    """Largest error ``(M, N)`` that float32 accumulation in any order, and rounding of the result, can make.

    Kernels may multiply codes minus 2^(b-1) first and take the zero point off the sum, so the terms that are rounded
    are as large as ``|x| * scale * (|code - 2^(b-1)| + |zero - 2^(b-1)|)``; there are at most K + 16 of each. One wrong
    code in a row moves the result by at least 1/(K * 2^b) of that sum, which is several times this bound.
    """
    _, scale, zero = operands
    columns = x.shape[1]
    wide = scale.double().repeat_interleave(columns // scale.shape[1], 1)
    off = torch.zeros_like(wide) if zero is None else (
        (zero.double() - 2 ** (bits - 1)) * scale.double()).repeat_interleave(columns // scale.shape[1], 1)
    terms = x.double().abs() @ ((dense.double() + off).abs() + off.abs()).T
    # bfloat16 is stored by truncation under Triton's interpreter: a whole unit in the last place, not half of one
    return exact.abs() * torch.finfo(x.dtype).eps + terms * (columns + 16) * 2.0**-24

"""The compiled searches behind torch tensors; see ``quant/beam.py``, ``quant/formats/pvq.py`` and ``grid.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels.cpu.build import load


def has_beam() -> bool:
    """Whether the compiled beam search is there; compiles it the first time."""
    return load("beam") is not None


def has_pyramid() -> bool:
    """Whether the compiled projection is there; compiles it the first time."""
    return load("pyramid") is not None


def has_grid_loss() -> bool:
    """Whether the compiled losses of tables are there; compiles them the first time."""
    return load("grid_loss") is not None


def grid_loss(
    weight: Tensor, importance: Tensor, unit: Tensor, kind: Tensor, values: Tensor, middles: Tensor
) -> Tensor:
    """Weighed squared errors ``(groups,)`` of ``weight (groups, g)`` at the nearest values of each group's table.

    All float32 and contiguous, but ``kind``. Runs in one thread.

    Args:
        importance: ``(period, g)``, for every ``period`` groups again.
        unit: ``(groups,)``, what values are multiplied by.
        kind: ``(groups,)`` uint8, which table.
        values, middles: ``(kinds, n)`` and ``(kinds, n - 1)`` in rising order, n up to 16.
    """
    library = load("grid_loss")
    assert library is not None, "ask has_grid_loss() first"
    loss = torch.empty(len(weight), dtype=torch.float32)
    library.fewbits_grid_loss(
        weight.data_ptr(), importance.data_ptr(), unit.data_ptr(), kind.data_ptr(), values.data_ptr(),
        middles.data_ptr(), loss.data_ptr(), len(weight), weight.shape[1], len(importance), values.shape[1])
    return loss


def beam(vectors: Tensor, books: Tensor, norms: Tensor, products: Tensor, stages: int, width: int) -> Tensor:
    """Codes int32 ``(V, stages)`` of ``vectors (V, d)``.

    Args:
        books: ``(d, stages * entries)``, all entries side by side.
        norms: ``(stages * entries,)``, half the square of their lengths.
        products: ``(stages * entries, stages * entries)``, of each entry with each.
    """
    library = load("beam")
    assert library is not None, "ask has_beam() first"
    vectors = vectors.float().contiguous()
    codes = torch.empty(len(vectors), stages, dtype=torch.int32)
    status = library.fewbits_beam(
        vectors.data_ptr(), books.data_ptr(), norms.data_ptr(), products.data_ptr(), codes.data_ptr(), len(vectors),
        stages, books.shape[1] // stages, len(books), width, torch.get_num_threads())
    if status:
        raise MemoryError(f"no memory to search {books.shape[1]} entries")
    return codes


def pyramid(vectors: Tensor, pulses: int) -> Tensor:
    """Points int8 ``(G, 16)`` of ``vectors (G, 16)``."""
    library = load("pyramid")
    assert library is not None, "ask has_pyramid() first"
    vectors = vectors.float().contiguous()
    points = torch.empty(vectors.shape, dtype=torch.int8)
    library.fewbits_pyramid(vectors.data_ptr(), points.data_ptr(), len(vectors), pulses, torch.get_num_threads())
    return points

"""The compiled searches of vector codes behind torch tensors; see ``quant/beam.py`` and ``quant/formats/pvq.py``."""

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

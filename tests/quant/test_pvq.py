"""Pyramid vectors: ranks of the lattice without a gap, the nearest points, and the grid of lengths."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fewbits
from fewbits.kernels.cpu import search as compiled
from fewbits.quant.errors import FormatError
from fewbits.quant.formats import parse_format, parse_layout
from fewbits.quant.formats.pvq import (
    GAIN_BITS,
    PULSES,
    SIZE,
    PVQFormat,
    _project,
    counts,
    gain_grid,
    project,
    rank,
    unrank,
)
from fewbits.quant.quantizers import GPTQ, RTN
from fewbits.quant.types import LayerStats, Layout, QuantizedTensor

torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_counts_are_those_of_the_closed_form() -> None:
    table = counts(16, 58)
    assert [counts(n, 8)[n][8] for n in (2, 3, 4, 5, 8, 16)] == [32, 258, 1408, 5890, 157184, 30316544]
    for n, k in itertools.product(range(1, 17), range(1, 59)):
        closed = sum(2**i * math.comb(n, i) * math.comb(k - 1, i - 1) for i in range(1, min(n, k) + 1))
        assert table[n][k] == closed
    for bits, pulses in PULSES.items():  # the most pulses whose ranks fit
        assert table[SIZE][pulses] <= 1 << (SIZE * bits) < counts(SIZE, pulses + 1)[SIZE][pulses + 1]


@pytest.mark.parametrize("size", range(1, 17))
def test_ranks_are_all_numbers_from_0_on(size: int) -> None:
    """Exhaustive up to a million points, drawn beyond."""
    for pulses in range(1, 17):
        total = counts(size, pulses)[size][pulses]
        if total <= 20_000 or (total <= 1_000_000 and pulses == 16):
            ranks = np.arange(total, dtype=np.uint64)
        else:
            ranks = np.random.default_rng(pulses).integers(0, total, 300, dtype=np.uint64)
        points = unrank(ranks, pulses, size)
        assert (np.abs(points.astype(int)).sum(1) == pulses).all()
        assert (rank(points, pulses) == ranks).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_ranks_of_what_is_stored(bits: int) -> None:
    """64 bits wide at 4 bits: the last rank is beyond what a signed integer holds."""
    total = counts(SIZE, PULSES[bits])[SIZE][PULSES[bits]]
    ranks = np.concatenate([np.random.default_rng(0).integers(0, total, 2000, dtype=np.uint64),
                            np.array([0, total - 1], dtype=np.uint64)])
    assert (rank(unrank(ranks, PULSES[bits]), PULSES[bits]) == ranks).all()
    damaged = unrank(np.array([np.iinfo(np.uint64).max], dtype=np.uint64), PULSES[bits])
    assert np.abs(damaged.astype(int)).sum() == PULSES[bits]


@pytest.mark.parametrize(("size", "pulses"), [(3, 4), (4, 5), (5, 3), (8, 4)])
def test_projection_finds_the_nearest_direction(size: int, pulses: int) -> None:
    total = counts(size, pulses)[size][pulses]
    every = torch.from_numpy(unrank(np.arange(total, dtype=np.uint64), pulses, size)).float()
    vectors = normal(400, size)
    best = (vectors @ (every / every.norm(dim=1, keepdim=True)).T).amax(1)
    points = project(vectors, pulses).float()
    assert bool((points.abs().sum(1) == pulses).all())
    found = (vectors * points).sum(1) / points.norm(dim=1)
    assert float((found >= best * (1 - 1e-5)).float().mean()) >= 0.99
    assert float((found / best).min()) > 0.95


def test_projection_follows_signs_scales_and_order() -> None:
    vectors, signs = normal(50, SIZE), normal(SIZE, seed=3).sign()
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(1))
    points = project(vectors, 12)
    assert torch.equal(project(vectors * 7, 12), points)
    assert torch.equal(project(vectors * signs, 12), points * signs.long())
    assert torch.equal(project(vectors[:, order], 12), points[:, order])
    assert int(project(torch.zeros(1, SIZE), 12).abs().sum()) == 12


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_lengths_lose_little(bits: int) -> None:
    """``1 / (2 N)`` is the variance of a length for each weight; a grid of b bits leaves some of it (Lloyd and Max)."""
    grid = gain_grid(bits)
    assert len(grid) == 1 << GAIN_BITS[bits] and bool((grid.diff() > 0).all())
    cosine = {2: 0.957, 3: 0.991, 4: 0.998}[bits]
    length = normal(20_000, SIZE).norm(dim=1) * cosine
    nearest = grid[(length[:, None] - grid).abs().argmin(1)]
    error = float((length - nearest).square().mean() / SIZE)
    assert error < {4: 0.0004, 5: 0.00011, 6: 0.00003}[GAIN_BITS[bits]]


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.082), (3, 0.0196), (4, 0.0045)])
def test_distortion_of_normal_values(bits: int, expected: float) -> None:
    fmt, values = PVQFormat(bits), normal(64, 400, seed=5)
    decoded = fmt.decode(fmt.encode(values, {}), {})
    assert float((decoded - values).square().mean() / values.square().mean()) < 1.02 * expected


@pytest.mark.parametrize("name", ["pvq2", "perm:pvq3", "pvq2[40]+trellis2[56]", "rvq2[32]+pvq4[64]"])
@pytest.mark.parametrize("quantizer", [RTN("search"), GPTQ()], ids=["rtn", "gptq"])
def test_stored_is_what_was_made(name: str, quantizer: RTN | GPTQ) -> None:
    layout, weight, x = parse_layout(name, 96), normal(64, 96) * 0.1, normal(300, 96, seed=2)
    made, _ = quantizer.quantize(weight, LayerStats(x.T @ x, len(x)), layout, seed=3)
    stored = made.pack()
    assert {k: (tuple(t.shape), t.dtype) for k, t in stored.items()} == layout.storage(64)
    assert torch.equal(QuantizedTensor.unpack(stored, layout).dequantize(), made.dequantize())


def test_names_shapes_and_damage() -> None:
    assert parse_format("pvq2") == PVQFormat(2)
    with pytest.raises(FormatError):
        parse_format("pvq5")
    with pytest.raises(FormatError, match="N = 40 is not a multiple of 16"):
        PVQFormat(2).storage(40, 64)
    layout = Layout.of(PVQFormat(2), 64)
    stored = RTN().quantize(normal(64, 64), None, layout)[0].pack()
    for name in ("weight_index", "weight_gain"):
        with pytest.raises(FormatError, match=f"{name}: got"):
            QuantizedTensor.unpack(stored | {name: stored[name][:-1]}, layout)
        with pytest.raises(FormatError, match=f"{name}: missing"):
            QuantizedTensor.unpack({k: v for k, v in stored.items() if k != name}, layout)
    noise = stored | {"weight_index": torch.full_like(stored["weight_index"], 255)}  # any bytes are some points
    assert bool(QuantizedTensor.unpack(noise, layout).dequantize().isfinite().all())


def test_from_a_recipe_to_logits(tiny, tmp_path: Path) -> None:
    settings = {"calibration.samples": 4, "calibration.seqlen": 32, "calibration.dtype": "float32"}
    fewbits.quantize(tiny("llama"), tmp_path / "q", recipe="pvq", overrides=settings)
    packed, dense = fewbits.load(tmp_path / "q"), fewbits.load(tmp_path / "q")
    dense.dequantize()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        for part in (ids, ids[:, :3]):
            torch.testing.assert_close(packed(part).logits, dense(part).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(not compiled.has_pyramid(), reason="no C compiler")
@pytest.mark.parametrize("pulses", [12, 27, 58])
def test_compiled_projection_is_that_of_torch(pulses: int) -> None:
    vectors = torch.randn(4000, SIZE, generator=torch.Generator().manual_seed(9))
    fast, slow = project(vectors, pulses), _project(vectors, pulses)
    assert float((fast == slow).all(1).float().mean()) > 0.999
    assert bool((fast.abs().sum(1) == pulses).all())
    turned = [float((vectors * p).sum(1).div(p.float().norm(dim=1)).mean()) for p in (fast, slow)]
    assert turned[0] == pytest.approx(turned[1], rel=1e-5)

"""Pyramid vector codes (arXiv 2410.16926): points of an integer lattice by their rank, and a gain.

A group is 16 consecutive rows of one column in the rotated basis. Its direction is that of a point of the pyramid
``{p in Z^16: sum |p_i| = pulses}``, stored as its rank among all of them, and its length is one of a grid that is best
for the length of a normal vector (Lloyd and Max). Nothing else is stored: lattice and grid are computed.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fewbits.kernels.cpu import search as compiled
from fewbits.quant.bitpack import pack_rows, packed_words, unpack_rows
from fewbits.quant.formats.joint import JointFormat
from fewbits.quant.types import Params, require_stored

_NAME = re.compile(r"pvq([2-4])")
SIZE = 16
PULSES = {2: 12, 3: 27, 4: 58}
"""Bits of index for a weight -> pulses: the most whose ranks fit in ``2 * bits`` bytes."""

GAIN_BITS = {2: 4, 3: 5, 4: 6}
"""So that the gain has about 3 % of the error of the direction."""

_COSINE = {2: 0.957, 3: 0.991, 4: 0.998}
"""Of the angle between a normal vector and its point, on average: what is coded is the length of the projection."""

_SWAPS = 2


@dataclass(frozen=True)
class PVQFormat(JointFormat):
    """``bits`` bits of index for each weight, and a quarter of a bit or a little more of gain."""

    bits: int

    unit = "a group"
    code_bits = 8
    height = SIZE
    depth = SIZE + 1  # the point, as int8, then the gain; a point becomes its rank when it is stored

    @property
    def index_bytes(self) -> int:
        return 2 * self.bits

    @property
    def name(self) -> str:
        return f"pvq{self.bits}"

    @staticmethod
    def parse(name: str) -> PVQFormat | None:
        """``pvq2``; None when the name is of another family."""
        return PVQFormat(int(m[1])) if (m := _NAME.fullmatch(name)) else None

    # -- codes --------------------------------------------------------------------------------------------------

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """Codes ``(N / 16 * 17, columns)`` of ``values (N, columns)``: for each group its point, then its gain."""
        vectors = self.column_vectors(values.float())
        points = project(vectors, PULSES[self.bits])
        length = (vectors * points).sum(1) / points.float().norm(dim=1)
        edges = (gains := gain_grid(self.bits).to(values.device))[1:].add(gains[:-1]).div(2)
        gain = torch.bucketize(length, edges).to(torch.uint8)
        codes = torch.cat([points.to(torch.int8).view(torch.uint8), gain[:, None]], 1)
        return self.code_rows(codes, values.shape[1])

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self.dense(*self.pulses(codes))

    @staticmethod
    def dense(points: Tensor, scale: Tensor) -> Tensor:
        """float32 ``(N, columns)`` from what :meth:`pulses` gives."""
        return (points.float() * scale[..., None]).transpose(1, 2).reshape(-1, points.shape[1])

    def pulses(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """The points int8 ``(N / 16, columns, 16)`` and what a pulse is worth, float32 ``(N / 16, columns)``."""
        columns = codes.shape[1]
        octets = codes.view(-1, self.depth, columns).transpose(1, 2)
        points = octets[..., :-1].contiguous().view(torch.int8)
        gains = gain_grid(self.bits).to(codes.device)[octets[..., -1].long()]
        return points, gains / points.float().norm(dim=2)

    # -- disk ---------------------------------------------------------------------------------------------------

    def storage(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        groups, _ = self.tiles(rows, columns)
        words = packed_words(columns, GAIN_BITS[self.bits])
        return {"weight_index": ((groups, self.index_bytes, columns), torch.uint8),
                "weight_gain": ((groups, words), torch.int32)}

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        columns = codes.shape[1]
        points, _ = self.pulses(codes)
        ranks = rank(points.reshape(-1, SIZE).cpu().numpy(), PULSES[self.bits]).astype("<u8")
        index = torch.from_numpy(ranks.view(np.uint8).reshape(-1, columns, 8)[..., : self.index_bytes].copy())
        gain = codes.view(-1, self.depth, columns)[:, -1]
        return {"weight_index": index.transpose(1, 2).contiguous().to(codes.device),
                "weight_gain": pack_rows(gain, GAIN_BITS[self.bits])}

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, dict[str, Tensor]]:
        require_stored(self.name, self.storage(rows, columns), tensors)
        index = tensors["weight_index"].transpose(1, 2)
        wide = np.zeros((*index.shape[:2], 8), dtype=np.uint8)
        wide[..., : self.index_bytes] = index.cpu().numpy()
        points = torch.from_numpy(unrank(wide.reshape(-1, 8).view("<u8")[:, 0].astype(np.uint64), PULSES[self.bits]))
        points = points.view(*index.shape[:2], SIZE).to(index.device).transpose(1, 2)
        gain = unpack_rows(tensors["weight_gain"], GAIN_BITS[self.bits], columns)
        return torch.cat([points.contiguous().view(torch.uint8), gain[:, None]], 1).reshape(-1, columns), {}


# -- the pyramid ------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def counts(size: int, pulses: int) -> list[list[int]]:
    """``V[n][k]``, the points of the pyramid of n coordinates and k pulses, for all up to ``size`` and ``pulses``.

    ``V(n, k) = V(n-1, k) + V(n, k-1) + V(n-1, k-1)`` (Fischer 1986).
    """
    table = [[int(k == 0) for k in range(pulses + 1)]]
    for _ in range(size):
        above, row = table[-1], [1]
        for k in range(1, pulses + 1):
            row.append(above[k] + row[k - 1] + above[k - 1])
        table.append(row)
    return table


@functools.lru_cache(maxsize=8)
def _starts(size: int, pulses: int) -> tuple[np.ndarray, np.ndarray]:
    """``starts[n, k, a]``: points of n + 1 coordinates and k pulses whose first is smaller than a in size; and V.

    A place that cannot be (a > k) has the largest number there is, beyond all ranks.
    """
    table = counts(size, pulses)
    starts = np.full((size, pulses + 1, pulses + 2), np.iinfo(np.uint64).max, dtype=np.uint64)
    for n in range(size):
        for k in range(pulses + 1):
            total = 0
            for a in range(k + 1):
                starts[n, k, a] = total
                total += table[n][k - a] * (1 if a == 0 else 2)
    return starts, np.array(table, dtype=np.uint64)


def rank(points: np.ndarray, pulses: int) -> np.ndarray:
    """Rank uint64 ``(G,)`` of ``points (G, size)`` among all of the pyramid: coordinates run 0, +1, -1, +2, -2, ..."""
    points = points.astype(np.int64)
    size = points.shape[1]
    starts, table = _starts(size, pulses)
    out, left = np.zeros(len(points), dtype=np.uint64), np.full(len(points), pulses)
    for i in range(size):
        x = points[:, i]
        rest = left - np.abs(x)
        out += starts[size - i - 1, left, np.abs(x)] + np.where(x < 0, table[size - i - 1, rest], np.uint64(0))
        left = rest
    return out


def unrank(ranks: np.ndarray, pulses: int, size: int = SIZE) -> np.ndarray:
    """Inverse of :func:`rank`: int8 ``(G, size)``. A rank beyond the last, as in a damaged file, gives some point."""
    starts, table = _starts(size, pulses)
    ranks = ranks % np.uint64(counts(size, pulses)[size][pulses])
    out, left = np.zeros((len(ranks), size), dtype=np.int8), np.full(len(ranks), pulses)
    for i in range(size):
        n = size - i - 1
        magnitude = (ranks[:, None] >= starts[n, left]).sum(1) - 1
        ranks = ranks - starts[n, left, magnitude]
        each = table[n, left - magnitude]
        negative = (magnitude > 0) & (ranks >= each)
        ranks = ranks - np.where(negative, each, np.uint64(0))
        out[:, i] = np.where(negative, -magnitude, magnitude)
        left = left - magnitude
    return out


def project(vectors: Tensor, pulses: int) -> Tensor:
    """The point int64 ``(G, size)`` of the pyramid that points most nearly where each of ``vectors (G, size)`` does.

    Pulses in proportion, rounded down; the rest one by one where they turn the point most; then single pulses change
    places as long as that helps, at most twice. Less than 1 % of all end beside the best point.
    """
    if vectors.shape[1] == SIZE and compiled.has_pyramid():  # faster than torch on any device
        return compiled.pyramid(vectors.cpu(), pulses).to(vectors.device).long()
    return _project(vectors, pulses)


def _project(vectors: Tensor, pulses: int) -> Tensor:
    size = vectors.abs()
    total = size.sum(1, keepdim=True)
    size = torch.where(total > 0, size, torch.ones_like(size))  # no direction is better than another
    points = ((pulses - 1) * size / size.sum(1, keepdim=True)).floor()
    for _ in range(int(pulses - float(points.sum(1).min()))):
        inner, power = (size * points).sum(1, keepdim=True), points.square().sum(1, keepdim=True)
        gain = (inner + size).square() / (power + 2 * points + 1)
        best = torch.zeros_like(points).scatter_(1, gain.argmax(1, keepdim=True), 1)
        points = points + best * (points.sum(1, keepdim=True) < pulses)
    for _ in range(_SWAPS):
        inner, power = (size * points).sum(1), points.square().sum(1)
        # a pulse from i to j
        turned = inner[:, None, None] - size[:, :, None] + size[:, None, :]
        norm = power[:, None, None] - 2 * points[:, :, None] + 2 * points[:, None, :] + 2
        cosine = (turned / norm.clamp(min=1).sqrt()).masked_fill((points == 0)[:, :, None], -torch.inf)
        cosine.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
        found, where = cosine.flatten(1).max(1)
        better = (found > inner / power.sqrt() * (1 + 1e-6)).float()[:, None]
        source, target = where // size.shape[1], where % size.shape[1]
        points = points.scatter_add(1, source[:, None], -better).scatter_add(1, target[:, None], better)
    return torch.where(vectors < 0, -points, points).long()


@functools.lru_cache(maxsize=8)
def gain_grid(bits: int) -> Tensor:
    """float32 ``(2 ** GAIN_BITS,)``: the best levels for the length of a normal vector of 16 entries, projected.

    Lloyd's algorithm on the chi distribution, integrated on a fine grid.
    """
    levels = 1 << GAIN_BITS[bits]
    x = torch.linspace(0.01, 9, 20_000, dtype=torch.float64)
    density = torch.exp((SIZE - 1) * x.log() - x.square() / 2 - (SIZE / 2 - 1) * math.log(2) - math.lgamma(SIZE / 2))
    mass = density.cumsum(0) / density.sum()
    grid = x[torch.searchsorted(mass, (torch.arange(levels) + 0.5) / levels)]
    for _ in range(200):
        cell = torch.bucketize(x, (grid[1:] + grid[:-1]) / 2)
        weight = torch.zeros(levels, dtype=torch.float64).index_add_(0, cell, density)
        grid = torch.zeros(levels, dtype=torch.float64).index_add_(0, cell, density * x) / weight
    return (grid * _COSINE[bits]).float()

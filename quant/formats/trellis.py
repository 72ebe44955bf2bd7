"""Bit-shift trellis codes with a computed codebook (QTIP, arXiv 2406.11235), for weights in a rotated basis.

A tile is 32 rows by 8 columns: 256 values in the order ``t = 32 * column + row``. Its codes make one circular string of
``256 * code_bits`` bits, the highest bit of each code first, and the ``state_bits`` bits that end with those of value
t are its state s. The value is a hash of the state, nearly normal with a deviation of 1: ``s * 0x83DCD12D`` modulo
2^32, the four bytes of that added up, less 510, times ``step``. No codebook is stored, every value can be decoded by
itself, and rotated weights need no scale either: the rotation has it.
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

from fewbits.quant.formats.joint import JointFormat
from fewbits.quant.types import Layout, Params, require_stored
from fewbits.quant.viterbi import search

_NAME = re.compile(r"trellis([1-4])(?:_l(1[0-6]))?")
_MULTIPLIER, _MEAN, _DEVIATION = 0x83DCD12D, 510, 147.8
DEFAULT_STATE_BITS = 12
HALF_BITS = (1.5, 2.5, 3.5)
"""Widths of :func:`trellis_layout` between those of a format."""

# The codebook is a little wider than what it codes: best for N(0, 1) at each width (benchmarks/distortion.py).
_WIDTH = {1: 0.9, 2: 1.04, 3: 1.1, 4: 1.12}


@dataclass(frozen=True)
class TrellisFormat(JointFormat):
    """``code_bits`` bits a weight; the search takes 2^``state_bits`` steps for each."""

    code_bits: int
    state_bits: int = DEFAULT_STATE_BITS

    unit = "a trellis tile"
    span = width = 8
    height = depth = 32

    @property
    def name(self) -> str:
        states = "" if self.state_bits == DEFAULT_STATE_BITS else f"_l{self.state_bits}"
        return f"trellis{self.code_bits}{states}"

    @staticmethod
    def parse(name: str) -> TrellisFormat | None:
        """``trellis2``, ``trellis3_l16``; None when the name is of another family."""
        if not (m := _NAME.fullmatch(name)):
            return None
        return TrellisFormat(int(m[1]), int(m[2] or DEFAULT_STATE_BITS))

    @property
    def step(self) -> float:
        """What one unit of a hash is worth."""
        return _WIDTH[self.code_bits] / _DEVIATION

    # -- codes --------------------------------------------------------------------------------------------------

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """Codes of ``values (N, 8 n)``, tile by tile: the bits that each value shifts into the state."""
        tiles = _to_tiles(values)
        flat = tiles.reshape(-1, self.height * self.span).float()
        codes = search(flat, codebook(self, values.device), self.code_bits)
        return _from_tiles(codes.view(tiles.shape))

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        """float32 values of ``codes (N, 8 n)``."""
        tiles = _to_tiles(codes).int()
        states = torch.zeros_like(tiles)
        for i in range(-(-self.state_bits // self.code_bits)):  # the codes that are still in the state
            states |= tiles.roll(i, -1) << (i * self.code_bits)
        values = codebook(self, codes.device)[states & ((1 << self.state_bits) - 1)]
        return _from_tiles(values)

    # -- disk ---------------------------------------------------------------------------------------------------

    def storage(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {"weight_trellis": ((*self.tiles(rows, columns), 8 * self.code_bits), torch.int32)}

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        (shape, _), = self.storage(*codes.shape).values()
        tiles = _to_tiles(codes).cpu().numpy()
        bits = np.unpackbits(tiles[..., None], axis=-1)[..., 8 - self.code_bits :]
        words = np.packbits(bits.reshape(*tiles.shape[:-1], -1), axis=-1).view(">u4").astype("<u4").view(np.int32)
        return {"weight_trellis": torch.from_numpy(words).view(shape).to(codes.device)}

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, dict[str, Tensor]]:
        require_stored(self.name, self.storage(rows, columns), tensors)
        packed = tensors["weight_trellis"]
        octets = packed.cpu().contiguous().numpy().view("<u4").astype(">u4").view(np.uint8)
        bits = np.unpackbits(octets, axis=-1).reshape(*packed.shape[:2], -1, self.code_bits)
        codes = np.packbits(bits, axis=-1)[..., 0] >> (8 - self.code_bits)
        return _from_tiles(torch.from_numpy(codes)).to(packed.device), {}


def trellis_layout(bits: float, state_bits: int, columns: int) -> Layout:
    """All columns at ``bits``; with a half bit, the second half of the columns has one bit more than the first."""
    low = TrellisFormat(math.floor(bits), state_bits)
    if bits == low.code_bits:
        return Layout.of(low, columns)
    high = TrellisFormat(low.code_bits + 1, state_bits)
    wide = columns // 2 // low.span * low.span  # met from below where the tiles do not divide in two
    return Layout(((low, columns - wide), (high, wide)))


@functools.lru_cache(maxsize=8)
def codebook(fmt: TrellisFormat, device: torch.device) -> Tensor:
    """The value of every state, float32."""
    hashes = torch.arange(1 << fmt.state_bits, device=device) * _MULTIPLIER & 0xFFFFFFFF
    octets = torch.stack([(hashes >> shift) & 0xFF for shift in (0, 8, 16, 24)]).sum(0)
    return (octets - _MEAN).float() * fmt.step


def _to_tiles(matrix: Tensor) -> Tensor:
    """``(N, K)`` as ``(N / 32, K / 8, 256)``, each tile in the order of its string."""
    rows, columns = matrix.shape
    h, w = TrellisFormat.height, TrellisFormat.span
    return matrix.reshape(rows // h, h, columns // w, w).permute(0, 2, 3, 1).reshape(rows // h, columns // w, h * w)


def _from_tiles(tiles: Tensor) -> Tensor:
    h, w = TrellisFormat.height, TrellisFormat.span
    rows, columns = tiles.shape[0] * h, tiles.shape[1] * w
    return tiles.view(-1, columns // w, w, h).permute(0, 3, 1, 2).reshape(rows, columns)

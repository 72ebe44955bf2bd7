"""Complex weights in {+1, +i, -1, -i} (iFairy), and real weights as two of them (Fairy2i).

A tile is the real 2 x 2 block ``R`` of rows 2i, 2i + 1 and columns 2j, 2j + 1. It maps a complex number
``x = x_2j + i x_(2j+1)`` to ``U x + V conj(x)`` with

    U = ((R11 + R22) + i (R21 - R12)) / 2        V = ((R11 - R22) + i (R12 + R21)) / 2

and nothing is lost by that. Both are sums of ``stages`` terms, each a power of i times a scale: that of the real axis
for +1 and -1, that of the imaginary axis for +i and -i. Scales are those of all tiles, separate for U and V and for
every stage, so a stage costs one bit a weight. At run time a stage is additions and subtractions of inputs, and a
product by two scales an output.

The paper pairs row i with i + N/2 and column j with j + K/2. That is this format with rows and columns in another
order; neighbours are paired here so that a tile is one place of a matrix, and its error feeds back into the next.

With one scale for both axes a stage is the signs of an orthonormal mix of the four entries of a tile. So on weights
that look normal the paper's choice loses what residual signs lose, 0.363, 0.131 and 0.058 of their power with one to
three stages. Codes and scales chosen jointly lose 0.363, 0.116 and 0.036. What the papers gain they gain by training.

All rows share the scales, so a weight whose rows differ in size wants a rotated basis, whose scales even them out: on
12 matrices of SmolLM2-135M ``had:fairy2`` loses a quarter of what ``fairy2`` does, for 0.045 bits more. Scales of every
64 columns gained 0.1 % there and 6 % without a rotation, so there is one set.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.quant.bitpack import pack_rows, packed_words, unpack_rows
from fewbits.quant.formats.joint import JointFormat
from fewbits.quant.formats.vq import stored_book
from fewbits.quant.kmeans import assign
from fewbits.quant.types import Params, Stored, require_stored

_NAME = re.compile(r"fairy([1-3])")
_SAMPLE = 1 << 18  # tiles that scales are made from; more tell them nothing new
_ROUNDS = 30


# -- complex matrices --------------------------------------------------------------------------------------------------


def widely_linear(weight: Tensor, *, halves: bool = False) -> tuple[Tensor, Tensor]:
    """U and V, complex64 ``(N / 2, K / 2)``, with ``y = U x + V conj(x)`` for ``weight (N, K)``, N and K even.

    ``halves``: row i belongs to i + N/2 and column j to j + K/2, as in the paper; otherwise to their neighbours.
    """
    n, k = weight.shape[0] // 2, weight.shape[1] // 2
    whole = weight.float()
    tiles = whole.reshape(2, n, 2, k).movedim(2, 1) if halves else whole.reshape(n, 2, k, 2).permute(1, 3, 0, 2)
    (r11, r12), (r21, r22) = tiles
    return torch.complex(r11 + r22, r21 - r12) / 2, torch.complex(r11 - r22, r12 + r21) / 2


def real_form(u: Tensor, v: Tensor, *, halves: bool = False) -> Tensor:
    """Inverse of :func:`widely_linear`: float32 ``(N, K)``."""
    tiles = torch.stack([v.real + u.real, v.imag - u.imag, v.imag + u.imag, u.real - v.real]).unflatten(0, (2, 2))
    tiles = tiles.movedim(1, 2) if halves else tiles.permute(2, 0, 3, 1)
    return tiles.reshape(2 * u.shape[0], 2 * u.shape[1])


def phases(z: Tensor) -> Tensor:
    """The power of i, int64 0 to 3, in whose quarter of the plane complex ``z`` lies (PhaseQuant of iFairy).

    Quarters are half open, ``[-pi/4, pi/4)`` and so on round; 0 itself is in the first.
    """
    rising, falling = z.real + z.imag, z.real - z.imag  # two comparisons in place of an angle
    code = torch.zeros(z.shape, dtype=torch.int64, device=z.device)
    code[(rising > 0) & (falling <= 0)] = 1
    code[(rising <= 0) & (falling < 0)] = 2
    code[(rising < 0) & (falling >= 0)] = 3
    return code


def powers(codes: Tensor) -> Tensor:
    """float32 ``(..., 2)``: ``i ** codes`` as its two coordinates."""
    units = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], device=codes.device)
    return units[codes.long()]


def axis_scales(z: Tensor, codes: Tensor, weight: Tensor | float = 1.0) -> Tensor:
    """float32 ``(2,)``: best scales of both axes for complex ``z`` and its codes; errors weigh ``weight``, as ``z``.

    That is the mean of what lies along the axis of those that have it. An axis that none has gets 0.
    """
    unit = powers(codes) * torch.as_tensor(weight, device=z.device).expand(z.shape).unsqueeze(-1)
    along = (unit * torch.view_as_real(z)).flatten(0, -2)
    return along.sum(0) / unit.abs().flatten(0, -2).sum(0).clamp(min=1e-30)


def residual_phases(z: Tensor, stages: int, weight: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """Codes ``(stages, ...)`` and scales ``(stages, 2)`` of complex ``z``, as the paper has them.

    Each stage is of what those before it leave.
    """
    codes, scales = [], []
    for _ in range(stages):
        codes.append(phases(z))
        scales.append(axis_scales(z, codes[-1], weight))
        z = z - torch.view_as_complex(powers(codes[-1]) * scales[-1])
    return torch.stack(codes), torch.stack(scales)


# -- the format --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FairyFormat(JointFormat):
    """``stages`` codes of 4 bits a tile, ``k_U + 4 k_V``; params ``scale (1, stages, 2, 2)``: U and V, then axes."""

    stages: int

    unit: ClassVar[str] = "a 2 x 2 tile of complex weights"
    rotated: ClassVar[bool] = False
    code_bits: ClassVar[int] = 4
    height: ClassVar[int] = 2
    span: ClassVar[int] = 2

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.stages

    @property
    def name(self) -> str:
        return f"fairy{self.stages}"

    @staticmethod
    def parse(name: str) -> FairyFormat | None:
        """``fairy2``; None when the name is of another family."""
        return FairyFormat(int(m[1])) if (m := _NAME.fullmatch(name)) else None

    # -- choosing scales ----------------------------------------------------------------------------------------

    def fit(self, weight: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """Scales as the paper has them, then codes and scales in turn until neither moves.

        A tile weighs what its columns do on average.
        """
        columns = torch.ones(weight.shape[1], device=weight.device) if importance is None else importance.float()
        mass = columns.view(-1, 2).mean(1).repeat(len(weight) // 2)
        chosen = torch.arange(len(mass))
        if len(mass) > _SAMPLE:
            chosen = torch.randperm(len(mass), generator=torch.Generator().manual_seed(0))[:_SAMPLE]
        chosen = chosen.to(weight.device)
        scales = [fit_scales(z.flatten()[chosen], self.stages, mass[chosen]) for z in widely_linear(weight)]
        return {"scale": stored_book(torch.stack(scales, 1))[None]}

    # -- codes --------------------------------------------------------------------------------------------------

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """The nearest of all sums of the stages: with one stage 4 for U and 4 for V, with three 64."""
        u, v = (assign(torch.view_as_real(z).flatten(0, 1), book)[0].view(z.shape)
                for z, book in zip(widely_linear(values), self.books(params)))
        codes = [(u >> 2 * t) & 3 | ((v >> 2 * t) & 3) << 2 for t in range(self.stages)]
        return torch.stack(codes, 1).flatten(0, 1).to(torch.uint8)

    def books(self, params: Params) -> Tensor:
        """float32 ``(2, 4 ** stages, 2)``: all values that U can have, and V; entry ``sum_t k_t 4^t`` has phases k."""
        return torch.stack([sums(scale) for scale in params["scale"][0].float().unbind(1)])

    def indexes(self, codes: Tensor) -> Tensor:
        """The entries of U and of V that codes stand for, int64 ``(2, N / 2, K / 2)``."""
        stages = codes.view(-1, self.stages, codes.shape[1]).long().unbind(1)
        digits = torch.stack([torch.stack([k >> part & 3 for part in (0, 2)]) << 2 * t for t, k in enumerate(stages)])
        return digits.sum(0)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        u, v = (book[index] for book, index in zip(self.books(params), self.indexes(codes)))
        return real_form(torch.view_as_complex(u), torch.view_as_complex(v))

    # -- disk ---------------------------------------------------------------------------------------------------

    def storage(self, rows: int, columns: int) -> Stored:
        down, across = self.tiles(rows, columns)
        return {"weight_phases": ((down * self.stages, packed_words(across, 4)), torch.int32),
                "weight_scale": ((1, self.stages, 2, 2), torch.float16)}

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"weight_phases": pack_rows(codes, 4), "weight_scale": params["scale"].contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, dict[str, Tensor]]:
        require_stored(self.name, self.storage(rows, columns), tensors)
        codes = unpack_rows(tensors["weight_phases"], 4, columns // self.span)
        return codes, {"scale": tensors["weight_scale"]}


def sums(scale: Tensor) -> Tensor:
    """float32 ``(4 ** stages, 2)`` from ``scale (stages, 2)``: entry ``sum_t k_t 4^t`` is ``sum_t scale_t * i^k_t``."""
    out = scale.new_zeros(1, 2)
    for own in scale:
        out = ((powers(torch.arange(4, device=scale.device)) * own)[:, None] + out).flatten(0, 1)
    return out


def fit_scales(z: Tensor, stages: int, weight: Tensor) -> Tensor:
    """float32 ``(stages, 2)``: a local minimum of the weighted error of complex ``z (P,)``, from the paper's scales on.

    Given codes, the coordinates of ``z`` are linear in the scales of their axis. All that enters the normal equations
    is what the points of one sum of powers weigh, and where they are on average.
    """
    points = torch.view_as_real(z)
    scale = residual_phases(z, stages, weight)[1]
    index = torch.arange(4**stages, device=z.device)
    units = torch.stack([powers(index >> 2 * t & 3) for t in range(stages)], 2).double().transpose(0, 1)
    before = None
    for _ in range(_ROUNDS):
        codes = assign(points, sums(scale))[0]
        if before is not None and torch.equal(codes, before):
            break
        before = codes
        mass = torch.bincount(codes, weight, minlength=len(index)).double()
        moment = [torch.bincount(codes, weight * own, minlength=len(index)) for own in points.unbind(1)]
        normal = units.mT * mass @ units
        normal.diagonal(dim1=1, dim2=2).add_(1e-9 * normal.diagonal(dim1=1, dim2=2).sum(1, keepdim=True) + 1e-30)
        scale = torch.linalg.solve(normal, (units.mT @ torch.stack(moment).double()[..., None])[..., 0]).T.float()
    return scale

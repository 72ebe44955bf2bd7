"""Few levels a group: ternary, binary and sums of binary bases, with one to four numbers and maybe a mean per group.

Every level is affine in the bits ``b_i`` of its code, which makes the whole family one decode:

    value = mean + sum_p scale_p (c_p + sum_i d_pi b_i)

    ternary   {-1, 0, 1} scale            codes 0, 1, 2: c = -1, d = (1, 2)
    binaryT   +-scale_1 +- ... +-scale_T  T bases of signs, T up to 4: c_p = -1, d_pp = 2 (BinaryDM, DB-LLM's dual form)
    fdb       {0, 1} scale_1 + {0, 1} scale_2   flexible dual binarization (DB-LLM, arXiv 2402.11960): d_pp = 1, where
              the second scale has the other sign and the signs of both are the group's own
    seq       {+-1/4, +-3/4} scale        stretched elastic quantization (ParetoQ, arXiv 2502.02631)

``ternary_g128`` is without a mean, ``ternary_mean_g128`` with one. Ternary codes take 2 bits, or with ``_b3`` at
the end 8 bits for 5 of them (3^5 = 243), in the digits of ggml's TQ1_0.

Parameters of a group are fitted exactly where that is cheap (ternary, binary), by alternating least squares from
several starts otherwise, in the squared error weighed by ``importance``. Codes of given levels follow from the weight
alone, so that an optimum cuts the sorted weights into runs, whatever the importance is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.quant.bitpack import pack_rows, pack_trits, packed_words, unpack_rows, unpack_trits
from fewbits.quant.errors import FormatError
from fewbits.quant.formats.integer import IntFormat
from fewbits.quant.formats.scalar import ScalarFormat, group_name
from fewbits.quant.solvers import als, three_means, two_magnitudes, two_means
from fewbits.quant.types import Params, Stored, require_stored


@dataclass(frozen=True)
class Basis:
    """Attributes:
    start: ``c_p`` of each scale.
    steps: ``d_pi`` of each scale for each bit.
    levels: how many of the codes are used.
    """

    start: tuple[float, ...]
    steps: tuple[tuple[float, ...], ...]
    levels: int

    @property
    def bits(self) -> int:
        return len(self.steps[0])

    def matrix(self, device: torch.device | None = None) -> Tensor:
        """float32 ``(levels, scales)``: what a level is of each scale."""
        codes = torch.arange(self.levels, device=device)
        bits = torch.stack([(codes >> i) & 1 for i in range(self.bits)], 1).float()
        return torch.tensor(self.start, device=device) + bits @ torch.tensor(self.steps, device=device).T


def _signs(count: int) -> Basis:
    return Basis((-1.0,) * count, tuple(tuple(2.0 * (i == p) for i in range(count)) for p in range(count)), 1 << count)


BASES = {
    "ternary": Basis((-1.0,), ((1.0, 2.0),), 3),
    "binary": _signs(1),
    **{f"binary{count}": _signs(count) for count in (2, 3, 4)},
    "fdb": Basis((0.0, 0.0), ((1.0, 0.0), (0.0, 1.0)), 4),
    "seq": Basis((-0.75,), ((0.5, 1.0),), 4),
}
"""Name -> what its levels are made of."""

MOST_PAIRS = 256
"""Largest group of ternary weights with a mean whose pairs of cuts are all tried: their number is its square."""

_NAME = re.compile(r"([a-z]+[234]?)(_mean)?_(?:g([1-9]\d*)|row)(_b3)?")


@dataclass(frozen=True)
class LevelsFormat(ScalarFormat):
    """Levels of one of :data:`BASES`; params ``scale``, ``scale2``, ..., and ``mean``.

    Attributes:
        family: key of :data:`BASES`.
        mean: whether a number of the group's own is added to all its levels.
        trits: ternary codes are stored 5 to a byte.
    """

    family: str
    group_size: int | None
    mean: bool = False
    trits: bool = False

    @property
    def name(self) -> str:
        return f"{self.family}{'_mean' * self.mean}_{group_name(self.group_size)}{'_b3' * self.trits}"

    @staticmethod
    def parse(name: str) -> LevelsFormat | None:
        """``ternary_g128``, ``ternary_mean_row_b3``, ``binary2_g64``; None when the name is of another family."""
        if (m := _NAME.fullmatch(name)) is None or m[1] not in BASES or (m[4] and m[1] != "ternary"):
            return None
        return LevelsFormat(m[1], int(m[3]) if m[3] else None, bool(m[2]), bool(m[4]))

    @property
    def basis(self) -> Basis:
        return BASES[self.family]

    @property
    def code_bits(self) -> int:
        return self.basis.bits

    @property
    def integers(self) -> IntFormat | None:
        """The format of integers with these values among its own, its codes being one more; None: there is none."""
        return IntFormat(2, self.group_size, symmetric=True) if self.family == "ternary" and not self.mean else None

    @property
    def names(self) -> tuple[str, ...]:
        """Of the parameters, in the order of :meth:`design`."""
        scales = tuple(f"scale{p + 1}" if p else "scale" for p in range(len(self.basis.start)))
        return scales + ("mean",) * self.mean

    def design(self, device: torch.device | None = None) -> Tensor:
        """float32 ``(levels, parameters)``: a level is the product of its row with the parameters."""
        matrix = self.basis.matrix(device)
        return torch.cat([matrix, torch.ones(len(matrix), 1, device=device)], 1) if self.mean else matrix

    # -- choosing parameters ------------------------------------------------------------------------------------

    def fit(self, weight: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """The least squared error of groups ``weight (..., g)``, weighed by ``importance`` or not."""
        weighed = torch.ones_like(weight) if importance is None else importance.expand_as(weight)
        made = self._solve(weight, weighed)
        return {name: _stored(value) for name, value in zip(self.names, made.unbind(-1))}

    def _solve(self, w: Tensor, h: Tensor) -> Tensor:
        """``(..., parameters)``, exact where :mod:`fewbits.quant.solvers` knows how."""
        match self.family, self.mean:
            case "ternary", False:
                return two_magnitudes(w, h, 0, 1)
            case "ternary", True if w.shape[-1] <= MOST_PAIRS:
                return three_means(w, h)
            case "seq", False:
                return two_magnitudes(w, h, 0.25, 0.75)
            case "binary", False:
                return two_magnitudes(w, h, 1, 1)
            case "binary", True:
                return two_means(w, h)
            case "binary2", False:
                return two_means(w.abs(), h).flip(-1)
        return als(w, h, self.design(w.device), dual=self.family == "fdb")

    # -- codes --------------------------------------------------------------------------------------------------

    def values(self, params: Params) -> Tensor:
        """float32 ``(levels, ...)``: what the levels are, parameters shaped ``(...)``."""
        stacked = torch.stack([params[name].float() for name in self.names])
        return torch.tensordot(self.design(stacked.device), stacked, 1)

    def encode(self, values: Tensor, params: Params) -> Tensor:
        levels = self.values(params)
        best, codes = (values - levels[0]).abs(), torch.zeros(values.shape, dtype=torch.uint8, device=values.device)
        for code, level in enumerate(levels[1:], 1):
            error = (values - level).abs()
            codes.masked_fill_(error < best, code)
            best = torch.minimum(best, error)
        return codes

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return sum(part * params[name].float() for name, part in self.linear(codes, params).items())  # type: ignore

    def linear(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return dict(zip(self.names, self.design(codes.device)[codes.long()].unbind(-1)))

    # -- disk ---------------------------------------------------------------------------------------------------

    def storage(self, rows: int, columns: int) -> Stored:
        groups = self.groups(columns)
        words = packed_words(columns, self.code_bits)
        codes = ((rows, -(-columns // 5)), torch.uint8) if self.trits else ((rows, words), torch.int32)
        return {"weight_packed": codes, **{f"weight_{name}": ((rows, groups), torch.float16) for name in self.names}}

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        packed = pack_trits(codes) if self.trits else pack_rows(codes, self.code_bits)
        return {"weight_packed": packed, **{f"weight_{name}": params[name].contiguous() for name in self.names}}

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, dict[str, Tensor]]:
        require_stored(self.name, self.storage(rows, columns), tensors)
        packed = tensors["weight_packed"]
        codes = unpack_trits(packed, columns) if self.trits else unpack_rows(packed, self.code_bits, columns)
        if self.basis.levels < 1 << self.code_bits and codes.numel() and int(codes.max()) >= self.basis.levels:
            raise FormatError(f"weight_packed: got a code of {int(codes.max())}, {self.name} has {self.basis.levels}; "
                              "the checkpoint is damaged, download or quantize it again")
        return codes, {name: tensors[f"weight_{name}"] for name in self.names}


def _stored(value: Tensor) -> Tensor:
    """A parameter of either sign in float16; raises FormatError where that cannot hold it."""
    if bool((value.abs() > (limit := torch.finfo(torch.float16).max)).any()):
        raise FormatError(f"scale: got {float(value.abs().max()):.3g}, float16 holds at most {limit:.3g}; give the "
                          "tensor an integer format with scales of bfloat16")
    return value.half()

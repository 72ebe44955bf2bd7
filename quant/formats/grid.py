"""Codes that look a value up in a table, times a scale: floats of few bits, quantiles, powers, tables by choice.

    value = scale * table[code]            nf4, fp3, fp4, mxfp4, nvfp4
    value = scale * tables[type][code]     fpq4, bitmod3, bitmod4, nupes3, nupes4: with a table chosen for each group

    nf4      quantiles of a normal distribution (QLoRA, arXiv 2305.14314)
    fp3, fp4 sign and magnitude: {0, 1, 2, 4}, and E2M1 {0, 0.5, 1, 1.5, 2, 3, 4, 6}
    fpq4     how 3 bits are split into exponent and mantissa: E1M2, E2M1 or E3M0 (LLM-FP4, arXiv 2310.16836)
    bitmod   fp3 or fp4 whose code for -0 means one of four special values (BitMoD, arXiv 2411.11745)
    nupes    powers of uniform grids, 16 exponents of which 1 is the uniform one (NUPES, arXiv 2308.05600)
    mxfp4    E2M1, groups of 32, scales that are powers of two in a byte (OCP microscaling 1.0)
    nvfp4    E2M1, groups of 16, scales in E4M3 and one of float32 for the whole tensor (NVIDIA)

Scales are searched: by how much the largest weight of a group may be clipped (or its scale be larger than it need be),
weighed by ``importance``, for each table; without importance the range is covered and the best table taken. ``mxfp4``
and ``nvfp4`` are on disk as compressed-tensors has them, codes and scales bit for bit.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.kernels.cpu import search as compiled
from fewbits.quant.bitpack import pack_rows, packed_words, unpack_rows
from fewbits.quant.errors import FormatError
from fewbits.quant.formats.scalar import ScalarFormat, group_name, storable
from fewbits.quant.types import Params, Stored, require_stored

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)

NF4 = (-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
       -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
       0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0)


def _signed(magnitudes: tuple[float, ...], special: float = 0.0) -> tuple[float, ...]:
    """Sign and magnitude: the upper half of the codes is negative, and that of -0 means ``special``."""
    return (*magnitudes, special, *(-m for m in magnitudes[1:]))


def _power(bits: int, exponent: float) -> tuple[float, ...]:
    """``sign(z) |z / m|^(1 / a)`` for ``z`` from ``-m - 1`` to ``m``, as two's complement codes plus ``2^(bits-1)``."""
    m = (1 << bits - 1) - 1
    return tuple((abs(z) / m) ** (1 / exponent) * (1 if z > 0 else -1) for z in range(-m - 1, m + 1))


def _bitmod(magnitudes: tuple[float, ...], extra: float, asymmetric: float) -> tuple[tuple[float, ...], ...]:
    return tuple(_signed(magnitudes, s) for s in (extra, -extra, asymmetric, -asymmetric))


_FP3 = (0.0, 1.0, 2.0, 4.0)
_TWICE_E2M1 = tuple(2 * m for m in E2M1)
_EXPONENTS = tuple(round(0.3 + 0.05 * i, 2) for i in range(16))

TABLES: dict[str, tuple[tuple[float, ...], ...]] = {
    "nf4": (NF4,),
    "fp3": (_signed(_FP3),),
    "fp4": (_signed(E2M1),),
    "fpq4": (_signed(tuple(map(float, range(8)))), _signed(E2M1), _signed((0.0, *(2.0**i for i in range(7))))),
    "bitmod3": _bitmod(_FP3, 3.0, 6.0),
    "bitmod4": _bitmod(_TWICE_E2M1, 10.0, 16.0),
    "nupes3": tuple(_power(3, a) for a in _EXPONENTS),
    "nupes4": tuple(_power(4, a) for a in _EXPONENTS),
    "mxfp4": (_signed(E2M1),),
    "nvfp4": (_signed(E2M1),),
}
"""Name -> the tables that a group can choose from, by code."""

_FIXED = {"mxfp4": 32, "nvfp4": 16}
_FACTORS = {"mxfp4": (0.5, 1.0, 2.0), "nvfp4": (0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5)}
"""How much of the largest weight the largest value of a table is; 1.5: E2M1's 4 takes it in place of 6."""
_COARSE = tuple(0.45 + 0.1 * i for i in range(7))
_FINE = (-0.05, -0.025, 0.025, 0.05)
_NAME = re.compile(r"(nf4|fp3|fp4|fpq4|bitmod[34]|nupes[34])_(?:g([1-9]\d*)|row)|(mxfp4|nvfp4)")


@dataclass(frozen=True)
class GridFormat(ScalarFormat):
    """Values of one of :data:`TABLES`; params ``scale`` (float32 for mxfp4 and nvfp4), ``type`` (uint8) where there are
    several tables, and ``global_scale`` of nvfp4.

    Attributes:
        family: key of :data:`TABLES`.
    """

    family: str
    group_size: int | None

    @property
    def name(self) -> str:
        return self.family if self.family in _FIXED else f"{self.family}_{group_name(self.group_size)}"

    @staticmethod
    def parse(name: str) -> GridFormat | None:
        """``nf4_g64``, ``bitmod3_g128``, ``mxfp4``; None when the name is of another family."""
        if (m := _NAME.fullmatch(name)) is None:
            return None
        return GridFormat(m[3], _FIXED[m[3]]) if m[3] else GridFormat(m[1], int(m[2]) if m[2] else None)

    def in_groups(self, size: int) -> GridFormat:
        return self if self.family in _FIXED else GridFormat(self.family, size)

    @property
    def code_bits(self) -> int:
        return len(TABLES[self.family][0]).bit_length() - 1

    @property
    def types(self) -> int:
        """Tables that a group can choose from."""
        return len(TABLES[self.family])

    @property
    def type_bits(self) -> int:
        return (self.types - 1).bit_length()

    @property
    def has_global(self) -> bool:
        """Whether there is one more scale, of the whole tensor."""
        return self.family == "nvfp4"

    # -- choosing parameters ------------------------------------------------------------------------------------

    def shared(self, weight: Tensor) -> dict[str, Tensor]:
        """What all groups of ``weight (N, K)`` share: the scale of nvfp4 by which those of groups are divided."""
        if not self.has_global:
            return {}
        largest = weight.abs().amax().float()
        return {"global_scale": torch.where(largest > 0, _E4M3_MAX * E2M1[-1] / largest.clamp(min=1e-30), 1.0)}

    def fit(self, weight: Tensor, importance: Tensor | None, global_scale: Tensor | None = None) -> dict[str, Tensor]:
        """Scale and table of groups ``weight (..., g)``, see the module.

        Args:
            global_scale: of :meth:`shared`; None: that of these weights.
        """
        fixed: dict[str, Tensor] = {}
        if self.has_global:
            scale = self.shared(weight.flatten(0, -2))["global_scale"] if global_scale is None else global_scale
            fixed = {"global_scale": scale.expand(weight.shape[:-1])}
        weighed = torch.ones_like(weight) if importance is None else importance
        largest = weight.abs().amax(-1)
        best = _Best(weight, weighed, self, fixed)
        factors = (1.0,) if importance is None else _FACTORS.get(self.family, _COARSE)
        for kind in self._kinds(search=importance is not None):
            reach = max(abs(v) for v in TABLES[self.family][kind])
            for factor in factors:
                best.attempt(largest * factor / reach, kind)
        if importance is not None:
            if self.types > 4:
                for beside in (-1, 1):
                    best.attempt_beside(beside)
            if self.family not in _FIXED:
                for step in _FINE:
                    best.attempt_near(step, largest)
                best.refit()
        return best.params

    def _kinds(self, *, search: bool) -> range:
        """Tables that are tried first; of many, every other one, whose neighbours follow."""
        return range(0, self.types, 2) if search and self.types > 4 else range(self.types)

    def _as_stored(self, ideal: Tensor, fixed: Params) -> Tensor:
        """Scales as they will be stored."""
        if self.family == "mxfp4":
            # the largest weight is taken to 4 or above, as the specification has it; it may be clipped by a third
            exponent = torch.frexp(ideal * E2M1[-1])[1] - 3
            return torch.exp2(exponent.clamp(-126, 127).float()).where(ideal > 0, torch.ones_like(ideal))
        if self.has_global:
            units = (ideal * fixed["global_scale"]).clamp(_E4M3_TINY, _E4M3_MAX)
            return units.to(torch.float8_e4m3fn).float()
        return storable(ideal, torch.float16)

    # -- codes --------------------------------------------------------------------------------------------------

    def _unit(self, params: Params) -> Tensor:
        """float32: what an entry of a table is multiplied by."""
        scale = params["scale"].float()
        return scale / params["global_scale"] if self.has_global else scale

    def encode(self, values: Tensor, params: Params) -> Tensor:
        codes, _, middles = _sorted_tables(self.family, values.device)
        ratio = values / self._unit(params)
        if self.types == 1:
            return codes[0][torch.bucketize(ratio.contiguous(), middles[0])]
        kind = params["type"].long()
        if kind.shape[-1] == 1:  # one table for every run of values
            rank = torch.searchsorted(middles[kind[..., 0]], ratio.contiguous())
        else:
            rank = torch.searchsorted(middles[kind], ratio[..., None].contiguous())[..., 0]
        return codes[kind, rank]

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self._entries(codes, params) * self._unit(params)

    def linear(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {} if self.family in _FIXED else {"scale": self._entries(codes, params)}

    def _entries(self, codes: Tensor, params: Params) -> Tensor:
        table = tables(self.family, codes.device)
        if self.types == 1:
            return table[0][codes.long()]
        return table.flatten()[params["type"].long() * table.shape[1] + codes]

    # -- disk ---------------------------------------------------------------------------------------------------

    def storage(self, rows: int, columns: int) -> Stored:
        groups = self.groups(columns)
        scale = {"mxfp4": torch.uint8, "nvfp4": torch.float8_e4m3fn}.get(self.family, torch.float16)
        out: Stored = {
            "weight_packed": ((rows, packed_words(columns, self.code_bits)), torch.int32),
            "weight_scale": ((rows, groups), scale),
        }
        if self.type_bits:
            out["weight_type"] = ((rows, packed_words(groups, self.type_bits)), torch.int32)
        if self.has_global:
            out["weight_global_scale"] = ((1,), torch.float32)
        return out

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        scale = params["scale"]
        if self.family == "mxfp4":
            scale = (torch.log2(scale).round() + 127).to(torch.uint8)
        elif self.has_global:
            scale = scale.to(torch.float8_e4m3fn)
        out = {"weight_packed": pack_rows(codes, self.code_bits), "weight_scale": scale.contiguous()}
        if self.type_bits:
            out["weight_type"] = pack_rows(params["type"], self.type_bits)
        if self.has_global:
            out["weight_global_scale"] = params["global_scale"].flatten()[:1].clone()
        return out

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, dict[str, Tensor]]:
        require_stored(self.name, self.storage(rows, columns), tensors)
        params = {"scale": tensors["weight_scale"]}
        if self.family == "mxfp4":
            params["scale"] = torch.exp2(params["scale"].float() - 127)
        elif self.has_global:
            params["scale"] = params["scale"].float()
            if not bool((whole := tensors["weight_global_scale"]).isfinite().all()) or float(whole) <= 0:
                raise FormatError(f"weight_global_scale: got {float(whole)}, needed a number above 0; the checkpoint "
                                  "is damaged, download or quantize it again")
            params["global_scale"] = whole.expand(params["scale"].shape)
        if self.type_bits:
            params["type"] = unpack_rows(tensors["weight_type"], self.type_bits, self.groups(columns))
            if params["type"].numel() and int(params["type"].max()) >= self.types:
                raise FormatError(f"weight_type: got {int(params['type'].max())}, {self.name} has {self.types} tables; "
                                  "the checkpoint is damaged, download or quantize it again")
        return unpack_rows(tensors["weight_packed"], self.code_bits, columns), params


_E4M3_MAX, _E4M3_TINY = 448.0, 2.0**-6
"""The largest, and the smallest that is not subnormal, which no reader flushes to 0."""


class _Best:
    """The best parameters so far of groups ``weight (..., g)``."""

    def __init__(self, weight: Tensor, importance: Tensor, fmt: GridFormat, fixed: Params) -> None:
        self._weight, self._importance = weight.contiguous(), importance.contiguous()
        self._format, self._fixed = fmt, fixed
        self._error = torch.full(weight.shape[:-1], torch.inf, device=weight.device)
        self._ideal = torch.ones_like(self._error)
        self._kind = torch.zeros(self._error.shape, dtype=torch.uint8, device=weight.device)
        trailing = importance.shape == weight.shape[weight.ndim - importance.ndim :]  # no axis of 1 in the middle
        plain = weight.device.type == "cpu" and weight.dtype == importance.dtype == torch.float32
        self._compiled = trailing and plain and compiled.has_grid_loss()

    @property
    def params(self) -> dict[str, Tensor]:
        out = {"scale": self._format._as_stored(self._ideal, self._fixed), **self._fixed}
        return out | ({"type": self._kind} if self._format.types > 1 else {})

    def attempt(self, ideal: Tensor, kind: int) -> None:
        self._keep(ideal, torch.full_like(self._kind, kind))

    def attempt_beside(self, step: int) -> None:
        """The next table, at the same largest value."""
        kind = (self._kind.int() + step).clamp(0, self._format.types - 1).to(torch.uint8)
        self._keep(self._ideal * (self._reach(self._kind) / self._reach(kind)), kind)

    def attempt_near(self, step: float, largest: Tensor) -> None:
        self._keep((self._ideal + largest * step / self._reach(self._kind)).clamp(min=0), self._kind)

    def refit(self) -> None:
        """Least squares for the scale, given the codes."""
        if "scale" in (parts := self._format.linear(self._codes(self.params), self._spread(self.params))):
            level = parts["scale"]
            over = (self._importance * level * self._weight).sum(-1)
            under = (self._importance * level.square()).sum(-1)
            self._keep((over / under).where(under > 0, self._ideal).clamp(min=0), self._kind)

    def _reach(self, kind: Tensor) -> Tensor:
        return tables(self._format.family, kind.device).abs().amax(1)[kind.long()]

    @staticmethod
    def _spread(params: Params) -> Params:
        return {k: v.unsqueeze(-1) for k, v in params.items()}

    def _codes(self, params: Params) -> Tensor:
        return self._format.encode(self._weight, self._spread(params))

    def _keep(self, ideal: Tensor, kind: Tensor) -> None:
        params = {"scale": self._format._as_stored(ideal, self._fixed), **self._fixed}
        loss = self._loss(self._format._unit(params), kind)
        better = loss < self._error
        self._error = loss.where(better, self._error)
        self._ideal, self._kind = ideal.where(better, self._ideal), kind.where(better, self._kind)

    def _loss(self, unit: Tensor, kind: Tensor) -> Tensor:
        _, values, middles = _sorted_tables(self._format.family, unit.device)
        if self._compiled:
            size = self._weight.shape[-1]
            return compiled.grid_loss(
                self._weight.view(-1, size), self._importance.view(-1, size), unit.flatten(), kind.flatten(), values,
                middles).view(unit.shape)
        own, unit = kind.long(), unit[..., None]
        rank = torch.searchsorted(middles[own] * unit, self._weight)
        error = self._weight - (values[own] * unit).gather(-1, rank)
        return torch.linalg.vecdot(error * self._importance, error)


@functools.cache
def tables(family: str, device: torch.device) -> Tensor:
    """float32 ``(types, 2^bits)`` by code."""
    return torch.tensor(TABLES[family], device=device)


@functools.cache
def _sorted_tables(family: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Of every table, ``(types, n)``: codes in rising order of their values, the values, and where one gives way to the
    next ``(types, n - 1)``. Tables with fewer than 2^bits values end in copies of their last that nothing comes to.

    A value just between two belongs to the one of even code, as IEEE rounding has it for E2M1; -0 is not used.
    """
    rows = []
    size = len(TABLES[family][0])
    for table in TABLES[family]:
        values = sorted(set(table))
        codes = [table.index(v) for v in values]
        middles = torch.tensor([(a + b) / 2 for a, b in itertools.pairwise(values)])
        upper_even = torch.tensor([c % 2 == 0 for c in codes[1:]])  # it takes the middle itself
        middles = torch.where(upper_even, torch.nextafter(middles, torch.tensor(-torch.inf)), middles)
        spare = size - len(values)
        rows.append((torch.tensor(codes + codes[-1:] * spare, dtype=torch.uint8),
                     torch.tensor(values + values[-1:] * spare), torch.cat([middles, torch.full((spare,), torch.inf)])))
    codes_of, values_of, middles_of = (torch.stack(part).to(device) for part in zip(*rows))
    return codes_of, values_of, middles_of

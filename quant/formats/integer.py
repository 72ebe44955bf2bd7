"""Uniform integers of 1 to 8 bits with one scale, and where asymmetric one zero point, per group of columns.

``value = scale * (code - zero_point)``, ``code`` and ``zero_point`` in ``[0, 2**bits)``; symmetric fixes
``zero_point = 2**(bits - 1)``. Tensors on disk have the names and the layout of compressed-tensors ``pack-quantized``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.quant.bitpack import pack_rows, packed_words, unpack_rows
from fewbits.quant.formats.scalar import ScalarFormat, group_name, storable
from fewbits.quant.types import Params, require_stored

_NAME = re.compile(r"int([1-8])(_sym)?_(?:g([1-9]\d*)|row)(_bf16|_f32)?")
_SCALE_DTYPES = {"": torch.float16, "_bf16": torch.bfloat16, "_f32": torch.float32}
_SCALE_NAMES = {v: k for k, v in _SCALE_DTYPES.items()}

# Clip search: shrink factors tried first, and steps tried around the best of them. The optimum of a group of real
# weights lies between 0.45 (2 bits) and 1.
_COARSE = [1 - 0.05 * i for i in range(13)]
_FINE = [-0.025, 0.025]


@dataclass(frozen=True)
class IntFormat(ScalarFormat):
    """Integers of ``code_bits`` bits over groups of ``group_size`` columns (None: the whole row)."""

    code_bits: int
    group_size: int | None
    symmetric: bool = False
    scale_dtype: torch.dtype = torch.float16

    @property
    def name(self) -> str:
        sym = "_sym" * self.symmetric
        return f"int{self.code_bits}{sym}_{group_name(self.group_size)}{_SCALE_NAMES[self.scale_dtype]}"

    @staticmethod
    def parse(name: str) -> IntFormat | None:
        """``int4_g64``, ``int8_sym_row``, ``int3_g128_bf16``; None when the name is of another family."""
        if not (m := _NAME.fullmatch(name)):
            return None
        bits, sym, group, dtype = m.groups()
        return IntFormat(int(bits), int(group) if group else None, bool(sym), _SCALE_DTYPES[dtype or ""])

    @property
    def levels(self) -> int:
        return 1 << self.code_bits

    # -- choosing parameters ------------------------------------------------------------------------------------

    def fit(self, weight: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """Scale and zero point of groups ``weight (..., g)``, rounded to what is stored.

        Without ``importance``: the range of the group, widened to contain 0. With it: the range shrunk (both ends
        alike) by whichever factor of a grid minimizes ``sum_j importance_j (w_j - q_j)^2``.
        """
        low = weight.amin(-1).clamp(max=0)
        high = weight.amax(-1).clamp(min=0)
        best = self._params(low, high)
        if importance is None:
            return best
        buffer = torch.empty_like(weight)
        negative = -weight
        best_error = self._error(weight, negative, importance, best, buffer)
        best_shrink = torch.ones_like(low)

        def attempt(shrink: Tensor | float) -> None:
            nonlocal best, best_error, best_shrink
            trial = self._params(low * shrink, high * shrink)
            error = self._error(weight, negative, importance, trial, buffer)
            better = error < best_error
            best = {k: torch.where(better, trial[k], best[k]) for k in best}
            best_shrink = torch.where(better, shrink * torch.ones_like(low), best_shrink)
            best_error = torch.where(better, error, best_error)

        for factor in _COARSE[1:]:
            attempt(factor)
        coarse = best_shrink
        for step in _FINE:
            attempt(coarse + step)
        return best

    def _error(self, weight: Tensor, negative: Tensor, importance: Tensor, params: Params, buffer: Tensor) -> Tensor:
        """``sum_j importance_j (w_j - q_j)^2`` per group, in place in ``buffer``: this is where the time goes."""
        scale = params["scale"].float().unsqueeze(-1)
        zero = torch.full_like(scale, self.levels / 2) if self.symmetric else params["zero_point"].float().unsqueeze(-1)
        torch.div(weight, scale, out=buffer).round_().clamp_(-zero, self.levels - 1 - zero)
        torch.addcmul(negative, buffer, scale, out=buffer)
        return torch.linalg.vecdot(buffer * importance, buffer)

    def _params(self, low: Tensor, high: Tensor) -> dict[str, Tensor]:
        if self.symmetric:
            # codes reach -2^(b-1) but only 2^(b-1) - 1 upwards; half a step of clipping at the top is the usual deal
            ideal = torch.maximum(-low, high) / max(self.levels / 2 - 0.5, 0.5)
        else:
            ideal = (high - low) / (self.levels - 1)
        scale = storable(ideal, self.scale_dtype)
        if self.symmetric:
            return {"scale": scale}
        zero = torch.round(-low / scale.float()).clamp(0, self.levels - 1)
        return {"scale": scale, "zero_point": zero.to(torch.uint8)}

    # -- codes --------------------------------------------------------------------------------------------------

    def _zero(self, params: Params) -> Tensor | float:
        return self.levels / 2 if self.symmetric else params["zero_point"].float()

    def encode(self, values: Tensor, params: Params) -> Tensor:
        codes = torch.round(values / params["scale"].float()).add_(self._zero(params))
        return codes.clamp_(0, self.levels - 1).to(torch.uint8)

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return (codes.float() - self._zero(params)) * params["scale"].float()

    def linear(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"scale": codes.float() - self._zero(params)}

    # -- disk ---------------------------------------------------------------------------------------------------

    def storage(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        groups = self.groups(columns)
        out: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "weight_packed": ((rows, packed_words(columns, self.code_bits)), torch.int32),
            "weight_scale": ((rows, groups), self.scale_dtype),
        }
        if not self.symmetric:
            out["weight_zero_point"] = ((packed_words(rows, self.code_bits), groups), torch.int32)
        return out

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        out = {"weight_packed": pack_rows(codes, self.code_bits), "weight_scale": params["scale"].contiguous()}
        if not self.symmetric:  # zero points are packed along the rows
            out["weight_zero_point"] = pack_rows(params["zero_point"].T, self.code_bits).T.contiguous()
        return out

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, dict[str, Tensor]]:
        require_stored(self.name, self.storage(rows, columns), tensors)
        params = {"scale": tensors["weight_scale"]}
        if not self.symmetric:
            params["zero_point"] = unpack_rows(tensors["weight_zero_point"].T.contiguous(), self.code_bits, rows).T
        return unpack_rows(tensors["weight_packed"], self.code_bits, columns), params

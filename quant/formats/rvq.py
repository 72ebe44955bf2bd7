"""Residual vector codes with small codebooks that all models share, for weights in a rotated basis.

A vector is 8 consecutive rows of one column: feedback from column to column then knows every error, which vectors along
the columns would hide from one another (VPTQ, arXiv 2409.17066). It is the sum of one entry of each of ``bits``
codebooks of 256, so that a code is a byte and a codebook 4 KB. Rotated weights are as good as normal, whatever the
model: the codebooks were trained on normal vectors once (``benchmarks/rvq_codebooks.py``), and none is stored.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor

from fewbits.quant.beam import SumSearch
from fewbits.quant.formats.joint import JointFormat, summed
from fewbits.quant.types import Params, require_stored

_NAME = re.compile(r"rvq([2-4])")

BEAM = 16
"""Partial sums that are kept after each stage. A greedy search (1) has a tenth more error."""


@dataclass(frozen=True)
class RVQFormat(JointFormat):
    """``bits`` bits a weight: a byte of each of ``bits`` codebooks for 8 of them."""

    bits: int

    unit = "a vector"
    code_bits = 8
    height = 8

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.bits

    @property
    def name(self) -> str:
        return f"rvq{self.bits}"

    @staticmethod
    def parse(name: str) -> RVQFormat | None:
        """``rvq2``; None when the name is of another family."""
        return RVQFormat(int(m[1])) if (m := _NAME.fullmatch(name)) else None

    def books(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
        """``(bits, 256, 8)``, exact in float16."""
        return _codebooks(self.bits, device, dtype)

    # -- codes --------------------------------------------------------------------------------------------------

    def encode(self, values: Tensor, params: Params) -> Tensor:
        """Codes ``(N / 8 * bits, columns)`` of ``values (N, columns)``."""
        found = _search(self.bits, values.device).search(self.column_vectors(values.float()), BEAM)
        return self.code_rows(found.to(torch.uint8), values.shape[1])

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return summed(codes, self.books(codes.device))

    # -- disk ---------------------------------------------------------------------------------------------------

    def storage(self, rows: int, columns: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        vectors, _ = self.tiles(rows, columns)
        return {"weight_codes": ((vectors, self.bits, columns), torch.uint8)}

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        return {"weight_codes": codes.reshape(-1, self.bits, codes.shape[1]).contiguous()}

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, dict[str, Tensor]]:
        require_stored(self.name, self.storage(rows, columns), tensors)
        return tensors["weight_codes"].reshape(-1, columns), {}


@functools.lru_cache(maxsize=8)
def _codebooks(bits: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    data = (resources.files("fewbits.quant.formats") / "rvq.safetensors").read_bytes()
    return load(data)[f"rvq{bits}"].to(device, dtype)


@functools.lru_cache(maxsize=8)
def _search(bits: int, device: torch.device) -> SumSearch:
    return SumSearch.of(_codebooks(bits, device, torch.float32))

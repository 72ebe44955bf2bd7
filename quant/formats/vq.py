"""Vector codes with codebooks of their own, made from the weight that they code.

Three families, told apart by where a vector lies and which codebook it is of:

- ``vq8_v4``, ``vq8x2_v8``: 4 (or 8) consecutive rows of one column, so that feedback from column to column knows every
  error (VPTQ, arXiv 2409.17066). The sum of an entry of each of the codebooks (x2: two), one set for the whole tensor
  (AQLM, arXiv 2401.06118, has them along the columns).
- ``pq8_v8``: 8 consecutive columns of one row, with a codebook for every 8 columns (product codes); over all columns
  at once it is VQ-Logits (arXiv 2505.10202), which gives rows of one cluster the same product.
- ``lrvq8_v4_d2``: 4 consecutive columns of one row, of one codebook whose entries are ``L u`` with ``L (4, 2)`` (LR2VQ,
  arXiv 2211.11397).

The 8 after the family is the bits of an index; the most are 16. Codebooks are stored in float16.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fewbits.quant.beam import SumSearch
from fewbits.quant.bitpack import pack_rows, packed_words, unpack_rows
from fewbits.quant.formats.joint import JointFormat, summed
from fewbits.quant.kmeans import assign, kmeans
from fewbits.quant.types import Params, Stored, require_stored

_VQ = re.compile(r"vq([89]|1[0-6])(?:x([2-4]))?_v([1-9][0-9]?)")
_PQ = re.compile(r"pq([89]|1[0-6])_v([1-9][0-9]{0,4})")
_LRVQ = re.compile(r"lrvq([89]|1[0-6])_v([1-9][0-9]?)_d([1-9][0-9]?)")

BEAM = 8
"""Partial sums kept after each stage."""


@dataclass(frozen=True)
class CodebookFormat(JointFormat):
    """What the three families share: indexes of ``code_bits`` bits, and codebooks in float16.

    Attributes:
        code_bits: of an index, 8 to 16.
        length: weights in a vector.
    """

    code_bits: int
    length: int

    unit: ClassVar[str] = "a vector"
    rotated: ClassVar[bool] = False

    @property
    def entries(self) -> int:
        return 1 << self.code_bits

    @property
    def name(self) -> str:
        raise NotImplementedError

    def books(self, params: Params) -> Tensor:
        """The entries float32 ``(G, entries, length)`` of each codebook; stages are one below the other."""
        return params["codebook"].float()

    def looked_up(self, codes: Tensor, books: Tensor) -> Tensor:
        """float32 ``(N, columns)``: the sums of entries that codes stand for."""
        raise NotImplementedError

    def decode(self, codes: Tensor, params: Params) -> Tensor:
        return self.looked_up(codes, self.books(params))

    def adjoint(self, codes: Tensor, values: Tensor, params: Params) -> Tensor:
        """float32, shaped as the codebook: ``decode`` is linear in it, and this is its transpose.

        ``values (N, columns)``: each entry gets the sum of what stands where it is used.
        """
        raise NotImplementedError

    def _codebook_shape(self, columns: int) -> tuple[int, ...]:
        return (1, self.entries, self.length)

    def _codes_shape(self, rows: int, columns: int) -> tuple[int, int]:
        down, across = self.tiles(rows, columns)
        return down * self.depth, across * self.width

    def _codes(self, indexes: Tensor) -> Tensor:
        return indexes.to(torch.uint8 if self.code_bits == 8 else torch.int32)

    # -- disk ---------------------------------------------------------------------------------------------------

    def storage(self, rows: int, columns: int) -> Stored:
        down, across = self._codes_shape(rows, columns)
        out: Stored = {"weight_codes": ((down, across), torch.uint8)}
        if self.code_bits > 8:
            out["weight_codes_high"] = ((down, packed_words(across, self.code_bits - 8)), torch.int32)
        return out | {"weight_codebook": (self._codebook_shape(columns), torch.float16)}

    def pack(self, codes: Tensor, params: Params) -> dict[str, Tensor]:
        out = {"weight_codes": (codes & 255).to(torch.uint8).contiguous()}
        if self.code_bits > 8:
            out["weight_codes_high"] = pack_rows(codes >> 8, self.code_bits - 8)
        return out | {f"weight_{name}": value for name, value in params.items()}

    def unpack(self, tensors: Mapping[str, Tensor], rows: int, columns: int) -> tuple[Tensor, dict[str, Tensor]]:
        require_stored(self.name, stored := self.storage(rows, columns), tensors)
        codes = tensors["weight_codes"]
        if self.code_bits > 8:
            high = unpack_rows(tensors["weight_codes_high"], self.code_bits - 8, codes.shape[1])
            codes = codes.int() | (high.int() << 8)
        return codes, {name.removeprefix("weight_"): tensors[name] for name in stored
                       if not name.startswith("weight_codes")}


@dataclass(frozen=True)
class VQFormat(CodebookFormat):
    """``stages`` codebooks of vectors of ``length`` rows; params ``codebook (1, stages * entries, length)``."""

    stages: int = 1

    @property
    def height(self) -> int:  # type: ignore[override]
        return self.length

    @property
    def depth(self) -> int:  # type: ignore[override]
        return self.stages

    @property
    def name(self) -> str:
        return f"vq{self.code_bits}{f'x{self.stages}' if self.stages > 1 else ''}_v{self.length}"

    @staticmethod
    def parse(name: str) -> VQFormat | None:
        """``vq8_v4``, ``vq8x2_v8``; None when the name is of another family."""
        return VQFormat(int(m[1]), int(m[3]), int(m[2] or 1)) if (m := _VQ.fullmatch(name)) else None

    def fit(self, weight: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """k-means of all vectors, each weighing what its column does; every stage, of what those before it leave."""
        columns = weight.shape[1]
        weights = torch.ones(columns, device=weight.device) if importance is None else importance.float()
        left, weights = self.column_vectors(weight.float()), weights.repeat(len(weight) // self.length)
        books: list[Tensor] = []
        for stage in range(self.stages):
            if stage:
                left = left - books[-1].float()[assign(left, books[-1].float())[0]]
            books.append(stored_book(kmeans(left, weights, self.entries)))
        return {"codebook": torch.cat(books)[None]}

    def _codebook_shape(self, columns: int) -> tuple[int, ...]:
        return (1, self.stages * self.entries, self.length)

    def encode(self, values: Tensor, params: Params) -> Tensor:
        vectors = self.column_vectors(values.float())
        if self.stages == 1:
            found = assign(vectors, params["codebook"][0].float())[0]
        else:
            found = _search(params["codebook"], self.stages).search(vectors, BEAM)
        return self.code_rows(self._codes(found), values.shape[1])

    def looked_up(self, codes: Tensor, books: Tensor) -> Tensor:
        return summed(codes, books.view(self.stages, self.entries, self.length))

    def adjoint(self, codes: Tensor, values: Tensor, params: Params) -> Tensor:
        out = torch.zeros(self.stages * self.entries, self.length, device=values.device)
        vectors, columns = self.column_vectors(values), codes.shape[1]
        for book, stage in zip(out.split(self.entries), codes.view(-1, self.stages, columns).unbind(1)):
            book.index_add_(0, stage.reshape(-1).long(), vectors)
        return out[None]


@functools.lru_cache(maxsize=4)
def _search(codebook: Tensor, stages: int) -> SumSearch:
    """Of ``codebook (1, stages * entries, length)``, by identity: a sweep asks for every column with the same one."""
    return SumSearch.of(codebook[0].float().unflatten(0, (stages, -1)))


class RowVectors(CodebookFormat):
    """Vectors of columns, of one codebook ``(1, entries, length)`` or of one for each place."""

    height: ClassVar[int] = 1

    @property
    def span(self) -> int:  # type: ignore[override]
        return self.length

    def encode(self, values: Tensor, params: Params) -> Tensor:
        books, places = self.books(params), values.shape[1] // self.length
        vectors = values.float().view(len(values), places, self.length)
        if len(books) < places:
            return self._codes(assign(vectors.flatten(0, 1), books[0])[0].view(-1, places))
        return self._codes(torch.stack([assign(vectors[:, i], book)[0] for i, book in enumerate(books)], 1))

    def looked_up(self, codes: Tensor, books: Tensor) -> Tensor:
        place = torch.arange(codes.shape[1], device=codes.device).clamp(max=len(books) - 1)
        return books[place, codes.long()].flatten(1)

    def _pulled(self, codes: Tensor, values: Tensor, books: int) -> Tensor:
        """Transpose of :meth:`looked_up` with so many codebooks."""
        out = torch.zeros(books, self.entries, self.length, device=values.device)
        vectors = values.reshape(len(values), -1, self.length)
        for i, own in enumerate(codes.unbind(1)):
            out[min(i, books - 1)].index_add_(0, own.long(), vectors[:, i])
        return out


@dataclass(frozen=True)
class ProductFormat(RowVectors):
    """A codebook for every ``length`` columns; params ``codebook (columns / length, entries, length)``."""

    @property
    def name(self) -> str:
        return f"pq{self.code_bits}_v{self.length}"

    @staticmethod
    def parse(name: str) -> ProductFormat | None:
        """``pq8_v8``; None when the name is of another family."""
        return ProductFormat(int(m[1]), int(m[2])) if (m := _PQ.fullmatch(name)) else None

    def groups(self, columns: int) -> int:
        super().groups(columns)
        return columns // self.length

    def fit(self, weight: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """k-means of the rows of every ``length`` columns, whose errors weigh what their columns do."""
        columns = weight.shape[1]
        scale = torch.ones(columns, device=weight.device) if importance is None else importance.float().sqrt()
        scale = scale.clamp(min=1e-6 * float(scale.max().clamp(min=1e-30)))
        ones = torch.ones(len(weight), device=weight.device)
        books = [kmeans(part.float() * own, ones, self.entries) / own
                 for part, own in zip(weight.split(self.length, 1), scale.split(self.length))]
        return {"codebook": stored_book(torch.stack(books))}

    def _codebook_shape(self, columns: int) -> tuple[int, ...]:
        return (self.groups(columns), self.entries, self.length)

    def adjoint(self, codes: Tensor, values: Tensor, params: Params) -> Tensor:
        return self._pulled(codes, values, len(params["codebook"]))


@dataclass(frozen=True)
class LowRankVQFormat(RowVectors):
    """Entries of rank ``rank``: params ``codebook (1, entries, rank)`` and ``basis (1, length, rank)``."""

    rank: int = 1

    @property
    def name(self) -> str:
        return f"lrvq{self.code_bits}_v{self.length}_d{self.rank}"

    @staticmethod
    def parse(name: str) -> LowRankVQFormat | None:
        """``lrvq8_v4_d2``, of a rank up to the length; None when the name is of another family."""
        if (m := _LRVQ.fullmatch(name)) is None or int(m[3]) > int(m[2]):
            return None
        return LowRankVQFormat(int(m[1]), int(m[2]), int(m[3]))

    def fit(self, weight: Tensor, importance: Tensor | None) -> dict[str, Tensor]:
        """The subspace that holds most of the weighted vectors, and k-means of their projections on it."""
        vectors = weight.float().reshape(-1, self.length)
        weights = torch.ones(len(vectors), device=weight.device)
        if importance is not None:  # a vector weighs what its columns do on average
            weights = importance.float().view(-1, self.length).mean(1).repeat(len(weight))
        _, basis = torch.linalg.eigh((vectors * weights[:, None]).T.double() @ vectors.double())
        basis = stored_book(basis[:, -self.rank :].float())
        # orthonormal but for rounding, so that distances in the subspace are distances
        book = stored_book(kmeans(vectors @ basis.float(), weights, self.entries))
        return {"codebook": book[None], "basis": basis[None]}

    def storage(self, rows: int, columns: int) -> Stored:
        return super().storage(rows, columns) | {"weight_basis": ((1, self.length, self.rank), torch.float16)}

    def _codebook_shape(self, columns: int) -> tuple[int, ...]:
        return (1, self.entries, self.rank)

    def books(self, params: Params) -> Tensor:
        return params["codebook"].float() @ params["basis"].float().mT

    def adjoint(self, codes: Tensor, values: Tensor, params: Params) -> Tensor:
        return self._pulled(codes, values, 1) @ params["basis"].float()


def stored_book(book: Tensor) -> Tensor:
    """As it is stored: float16, within its range."""
    limit = torch.finfo(torch.float16).max
    return book.clamp(-limit, limit).half()

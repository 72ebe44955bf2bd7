"""Sums of codebook entries that come closest to vectors: a beam search, stage by stage (AQLM, arXiv 2401.06118)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fewbits.kernels.cpu import search as compiled

_CHUNK = 1 << 13  # vectors searched at a time in torch: 128 MB for the scores of a beam of 16
_MOST = 2048  # entries in all, up to which the compiled search is quick: it has a table of the products of any two


@dataclass(frozen=True)
class SumSearch:
    """A search of codebooks, and what it needs of them; made once for many searches.

    Attributes:
        books: float32 ``(stages, entries, d)``.
        across: ``(d, stages * entries)``.
        norms: ``(stages * entries,)``, half the square of each entry's length.
        products: ``(stages * entries, stages * entries)``, of each entry with each. Empty where they would be too many.
    """

    books: Tensor
    across: Tensor
    norms: Tensor
    products: Tensor

    @staticmethod
    def of(books: Tensor) -> SumSearch:
        flat = books.flatten(0, 1).cpu()
        products = flat @ flat.T if len(flat) <= _MOST else flat.new_empty(0, 0)
        return SumSearch(books, flat.T.contiguous(), flat.square().sum(1) / 2, products)

    def search(self, vectors: Tensor, beam: int) -> Tensor:
        """Codes int32 ``(V, stages)`` of ``vectors (V, d)``: entries that add up to them, nearly.

        After each stage the ``beam`` best partial sums are kept. Then each stage in turn takes the best entry given the
        others, as long as that changes anything, at most 3 times.
        """
        stages, entries, _ = self.books.shape
        if len(self.products) and entries % 16 == 0 and stages <= 4 and compiled.has_beam():
            found = compiled.beam(vectors.cpu(), self.across, self.norms, self.products, stages, beam)
            return found.to(vectors.device)
        return torch.cat([beam_search(part, self.books, beam) for part in vectors.split(_CHUNK)])


def beam_search(vectors: Tensor, books: Tensor, beam: int) -> Tensor:
    """:meth:`SumSearch.search` in torch, for ``books (stages, entries, d)`` of any size."""
    residual, codes = vectors[:, None], torch.empty(len(vectors), 1, 0, dtype=torch.long, device=vectors.device)
    for book in books:
        scores = book.square().sum(1) - 2 * residual @ book.T + residual.square().sum(-1, keepdim=True)  # (V, B, k)
        kept = scores.flatten(1).topk(min(beam, scores[0].numel()), largest=False).indices
        parent, entry = kept // len(book), kept % len(book)
        residual = residual.gather(1, parent[..., None].expand(-1, -1, residual.shape[-1])) - book[entry]
        codes = torch.cat([codes.gather(1, parent[..., None].expand(-1, -1, codes.shape[-1])), entry[..., None]], -1)
    best = codes[:, 0]  # topk sorts
    for _ in range(3):
        before = best.clone()
        total = torch.stack([book[best[:, m]] for m, book in enumerate(books)]).sum(0)
        for m, book in enumerate(books):
            others = total - book[best[:, m]]
            best[:, m] = (book.square().sum(1) - 2 * (vectors - others) @ book.T).argmin(1)
            total = others + book[best[:, m]]
        if torch.equal(best, before):
            break
    return best.int()

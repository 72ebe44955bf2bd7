"""Train the codebooks of the rvq formats on normal vectors and write them to quant/formats/rvq.safetensors.

    python -m benchmarks.rvq_codebooks [--vectors 60000] [--rounds 16]

A codebook for each stage by k-means on what the stages before it leave. Then rounds, each with vectors of its own: they
are coded with a beam, and every entry becomes the mean of what the other stages left to it, in this round and, fading,
in those before. The error that is printed is of vectors not seen yet. Formats depend on every bit of the result: a new
one needs a new name.
"""

from __future__ import annotations

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import protocol
from fewbits.quant.beam import beam_search
from fewbits.quant.formats.rvq import BEAM, RVQFormat

ENTRIES, FADING = 256, 0.75


def main() -> None:
    parser = protocol.parser(__doc__)
    parser.add_argument("--vectors", type=int, default=60_000)
    parser.add_argument("--rounds", type=int, default=16)
    args = parser.parse_args()
    draw = torch.Generator().manual_seed(0)
    vectors = torch.randn(args.vectors, RVQFormat.height, generator=draw)
    out = {}
    for bits in (2, 3, 4):
        books = residual_k_means(vectors, bits, 8, draw)
        sums, counts = torch.zeros_like(books), torch.zeros(bits, ENTRIES, 1)
        for i in range(args.rounds):
            fresh = torch.randn(args.vectors, RVQFormat.height, generator=draw)
            codes = torch.cat([beam_search(part, books, BEAM) for part in fresh.split(1 << 13)]).long()
            rest = fresh - decoded(codes, books)
            print(f"{bits} bits, round {i}: {float(rest.square().mean()):.5f}", flush=True)
            sums, counts = FADING * sums, FADING * counts
            for m in range(bits):
                left = rest + books[m][codes[:, m]]
                sums[m].index_add_(0, codes[:, m], left)
                counts[m] += torch.bincount(codes[:, m], minlength=ENTRIES)[:, None]
                books[m] = torch.where(counts[m] > 0, sums[m] / counts[m].clamp(min=1), books[m])
                rest = left - books[m][codes[:, m]]
            books = books.half().float()
        out[f"rvq{bits}"] = books.half().contiguous()
    save_file(out, protocol.ROOT / "quant" / "formats" / "rvq.safetensors")


def residual_k_means(vectors: Tensor, stages: int, rounds: int, draw: torch.Generator) -> Tensor:
    books, rest = [], vectors
    for _ in range(stages):
        book = rest[torch.randperm(len(rest), generator=draw)[:ENTRIES]].clone()
        for _ in range(rounds):
            nearest = (book.square().sum(1) - 2 * rest @ book.T).argmin(1)
            book = means(rest, nearest, book)
        books.append(book)
        rest = rest - book[(book.square().sum(1) - 2 * rest @ book.T).argmin(1)]
    return torch.stack(books)


def means(values: Tensor, index: Tensor, old: Tensor) -> Tensor:
    """Mean of the values of each index; an entry that has none stays."""
    count = torch.bincount(index, minlength=len(old))[:, None]
    return torch.where(count > 0, torch.zeros_like(old).index_add_(0, index, values) / count.clamp(min=1), old)


def decoded(codes: Tensor, books: Tensor) -> Tensor:
    return torch.stack([book[codes[:, m]] for m, book in enumerate(books)]).sum(0)


if __name__ == "__main__":
    main()

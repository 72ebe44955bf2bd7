"""The best path through a bit-shift trellis that bites its tail (QTIP, arXiv 2406.11235, section 3).

A state is ``state_bits`` bits; each value shifts ``code_bits`` new ones in, and costs the square of its distance to the
codebook's entry of the state. What two neighbouring states share is their *edge*.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fewbits.kernels.cpu import trellis as compiled

CHUNK_BYTES = 1 << 28
"""Costs kept at a time by the search in torch."""


def search(values: Tensor, codebook: Tensor, code_bits: int) -> Tensor:
    """Codes uint8 ``(B, T)`` of ``values (B, T)`` float32: the bits that each value shifts in.

    The string of a row's codes is circular, so its path must end in the edge that it starts from. A free search over
    the row turned by half a round finds a good edge, and a second search is bound to it: exact for rows of 256 as far
    as anybody has seen, and never tried on short ones.

    Args:
        codebook: float32 ``(2 ** state_bits,)``.
    """
    if values.shape[1] == compiled.TILE and compiled.can_search():  # faster than torch on any device
        return compiled.search(values.cpu(), codebook.cpu(), code_bits).to(values.device)
    edges = len(codebook) >> code_bits
    step = max(1, CHUNK_BYTES // (4 * edges * (values.shape[1] + 1)))
    return torch.cat([_search(rows, codebook, code_bits) for rows in values.split(step)])


def _search(values: Tensor, codebook: Tensor, code_bits: int) -> Tensor:
    half, edges = values.shape[1] // 2, len(codebook) >> code_bits
    turned = values.roll(-half, 1)
    costs = _forward(turned, codebook, code_bits, torch.zeros(len(values), edges, device=values.device))
    seam, _ = _backward(turned, codebook, code_bits, costs, costs[-1].argmin(1), first=half)
    start = torch.full((len(values), edges), torch.inf, device=values.device).scatter_(1, seam[:, None], 0)
    costs = _forward(values, codebook, code_bits, start)
    return _backward(values, codebook, code_bits, costs, seam, first=0)[1]


def _forward(values: Tensor, codebook: Tensor, code_bits: int, start: Tensor) -> list[Tensor]:
    """For each edge ``(B, edges)``: the cost of the best path that ends in it, before the first and after each value.

    Edge e continues from the states ``j * edges + e``, j < 2 ** code_bits.
    """
    costs = [start]
    for x in values.T:
        error = codebook - x[:, None]
        total = costs[-1].repeat_interleave(1 << code_bits, 1) + error * error
        costs.append(total.view(len(values), 1 << code_bits, -1).amin(1))
    return costs


def _backward(
    values: Tensor, codebook: Tensor, code_bits: int, costs: list[Tensor], edge: Tensor, *, first: int
) -> tuple[Tensor, Tensor]:
    """The edge before value ``first`` on the best path to ``edge`` at the end, and the codes from there on."""
    edges, codes = costs[0].shape[1], []
    branch = torch.arange(1 << code_bits, device=values.device) * edges
    for t in range(values.shape[1] - 1, first - 1, -1):
        states = edge[:, None] + branch
        error = codebook[states] - values[:, t, None]
        total = costs[t].gather(1, states >> code_bits) + error * error
        state = states.gather(1, total.argmin(1, keepdim=True))[:, 0]
        codes.append((state & ((1 << code_bits) - 1)).to(torch.uint8))
        edge = state >> code_bits
    return edge, torch.stack(codes[::-1], 1)

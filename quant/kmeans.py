"""Weighted k-means (Lloyd 1957, seeds as in k-means++), the same on every run."""

from __future__ import annotations

import torch
from torch import Tensor

_PER_CENTER = 128  # points that a center is made from; more tell it nothing new
_SEEDED = 1024  # centers up to which seeds are spread out; more of them cost too much, and random ones will do
_CHUNK = 1 << 18  # entries of a matrix of distances: it stays in the cache


def kmeans(points: Tensor, weight: Tensor, centers: int, *, iterations: int = 20) -> Tensor:
    """``(centers, d)`` float32: a local minimum of ``sum_i weight_i min_c |points_i - c|^2`` over ``points (P, d)``.

    A center that no point is nearest to moves to where the error is largest. Where there are no more points than
    centers, these are the points, and zeros.
    """
    generator = torch.Generator().manual_seed(0)
    points, weight = points.float(), weight.float()
    if len(points) <= centers:
        return torch.cat([points, points.new_zeros(centers - len(points), points.shape[1])])
    if len(points) > _PER_CENTER * centers:
        chosen = torch.randperm(len(points), generator=generator)[: _PER_CENTER * centers].to(points.device)
        points, weight = points[chosen], weight[chosen]
    found = _seeds(points, weight, centers, generator)
    for _ in range(iterations):
        nearest, error = assign(points, found)
        order = nearest.argsort(stable=True)  # sums over sorted runs: atomic ones would differ from run to run
        count = torch.bincount(nearest, minlength=centers)
        mass = torch.segment_reduce(weight[order], "sum", lengths=count)
        total = torch.segment_reduce((points * weight[:, None])[order], "sum", lengths=count, axis=0)
        # what weighs nothing stays where it is
        found = torch.where(mass[:, None] > 0, total / mass.clamp(min=1e-30)[:, None], found)
        if len(empty := (count == 0).nonzero()[:, 0]):
            found[empty] = points[(error * weight).topk(len(empty)).indices]
    return found


def assign(points: Tensor, centers: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of ``centers (C, d)`` to each of ``points (P, d)`` and its squared distance, ``(P,)`` each."""
    half = centers.square().sum(1) / 2
    nearest, error = [], []
    for part in points.split(max(1, _CHUNK // len(centers))):
        best = torch.addmm(half, part, centers.T, alpha=-1).min(1)
        nearest.append(best.indices)
        error.append((2 * best.values + part.square().sum(1)).clamp(min=0))
    return torch.cat(nearest), torch.cat(error)


def _seeds(points: Tensor, weight: Tensor, centers: int, generator: torch.Generator) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each seed is drawn by its weighted distance to those before it."""
    draws = torch.rand(centers, generator=generator, dtype=torch.float64).tolist()
    if centers > _SEEDED:
        return points[torch.randperm(len(points), generator=generator)[:centers].to(points.device)].clone()
    chosen: list[int] = []
    distance = torch.full((len(points),), torch.inf, device=points.device)
    for draw in draws:
        odds = (weight if not chosen else weight * distance).double().cumsum(0)
        at = int(torch.searchsorted(odds, draw * odds[-1], right=True)) if odds[-1] > 0 else len(chosen)
        chosen.append(min(at, len(points) - 1))
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
    return points[torch.tensor(chosen, device=points.device)].clone()

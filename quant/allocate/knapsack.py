"""The multiple-choice knapsack: one option for every unit, least total loss, total cost within a budget. Exact.

Dominated options go first. The greedy walk along the lower convex hulls gives the price of a byte (the LP's dual) and
a first solution. At that price every option has a reduced cost, what it loses against the best of its unit; a choice
whose reduced costs add up to more than the gap between the first solution and the LP's bound cannot be better than
that solution. A dynamic program over the few options and states that remain decides.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fewbits.quant.errors import BudgetError

_MAX_STATES = 200_000


@dataclass(frozen=True)
class Option:
    """An option of a unit that is not dominated: ``index`` is its place among those given."""

    cost: int
    loss: float
    index: int


@dataclass(frozen=True)
class Solution:
    """One option index per unit.

    Attributes:
        cost: total, at most the budget.
        price: loss that one more unit of cost would save (the LP's dual).
        exact: whether the dynamic program kept every state; else ``loss`` is within ``gap`` of the optimum.
        gap: distance to the LP's bound.
    """

    choice: tuple[int, ...]
    cost: int
    loss: float
    price: float
    exact: bool
    gap: float


def solve(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> Solution:
    """Choose one option ``o`` of every unit ``u``: least ``sum losses[u][o]`` with ``sum costs[u][o] <= budget``.

    Raises:
        BudgetError: even the cheapest options exceed the budget.
    """
    units = [undominated(c, e) for c, e in zip(costs, losses)]
    if (cheapest := sum(u[0].cost for u in units)) > budget:
        raise BudgetError(f"budget: got {budget}, the smallest that is reachable is {cheapest}")
    first, price = _greedy(units, budget)
    floor = [min(o.loss + price * o.cost for o in u) for u in units]
    gap = max(sum(o.loss for o in first) - (sum(floor) - price * budget), 0.0)
    better, exact = _decide(units, price, floor, gap, budget)
    best = min((p for p in (first, better) if p), key=lambda p: sum(o.loss for o in p))
    return Solution(
        tuple(o.index for o in best), sum(o.cost for o in best), sum(o.loss for o in best), price, exact,
        max(sum(o.loss for o in best) - (sum(floor) - price * budget), 0.0),
    )


def undominated(costs: Sequence[int], losses: Sequence[float]) -> list[Option]:
    """By rising cost and falling loss."""
    out: list[Option] = []
    for cost, loss, i in sorted((int(c), float(e), i) for i, (c, e) in enumerate(zip(costs, losses))):
        if not out or loss < out[-1].loss:
            out.append(Option(cost, loss, i))
    return out


def hull(options: list[Option]) -> list[Option]:
    """Those on the lower convex hull of (cost, loss)."""
    out: list[Option] = []
    for o in options:
        while len(out) > 1:
            a, b = out[-2:]
            if (b.loss - a.loss) * (o.cost - a.cost) < (o.loss - a.loss) * (b.cost - a.cost):
                break
            out.pop()
        out.append(o)
    return out


def _greedy(units: list[list[Option]], budget: int) -> tuple[list[Option], float]:
    """Steps along the hulls, steepest first, as long as they fit; and the slope of the first that did not."""
    steps = []
    for u, options in enumerate(units):
        edge = hull(options)
        steps += [((a.loss - b.loss) / (b.cost - a.cost), u, a, b) for a, b in itertools.pairwise(edge)]
    choice, price = [u[0] for u in units], 0.0
    left = budget - sum(o.cost for o in choice)
    for slope, u, a, b in sorted(steps, key=lambda s: (-s[0], s[1])):
        if choice[u] is a and b.cost - a.cost <= left:
            choice[u], left = b, left - (b.cost - a.cost)
        elif not price:
            price = slope
    return choice, price


def _decide(
    units: list[list[Option]], price: float, floor: list[float], gap: float, budget: int
) -> tuple[list[Option] | None, bool]:
    """The best choice by dynamic programming over states (cost, loss, sum of reduced costs), unit by unit.

    A state is dropped when another is no dearer and no worse, when it cannot be completed within the budget, or when
    its reduced costs exceed the gap. None if rounding drops all; False if there were too many states to keep.
    """
    limit = gap * (1 + 1e-6) + 1e-12 * sum(map(abs, floor))
    core = [[o for o in u if o.loss + price * o.cost - f <= limit] for u, f in zip(units, floor)]
    order = sorted(range(len(core)), key=lambda u: (len(core[u]), u))
    rest = sum(min(o.cost for o in u) for u in core)
    cost, loss, reduced = np.zeros(1, np.int64), np.zeros(1), np.zeros(1)
    trail, exact = [], True
    for u in order:
        options = core[u]
        rest -= min(o.cost for o in options)
        n = len(options)
        cs, ls = np.array([o.cost for o in options], np.int64), np.array([o.loss for o in options])
        cost, loss = (cost[:, None] + cs).ravel(), (loss[:, None] + ls).ravel()
        reduced = (reduced[:, None] + (ls + price * cs - floor[u])).ravel()
        keep = np.flatnonzero((cost + rest <= budget) & (reduced <= limit))
        keep = keep[np.lexsort((loss[keep], cost[keep]))]
        lowest = np.minimum.accumulate(loss[keep])
        keep = keep[np.concatenate(([True], lowest[1:] < lowest[:-1]))] if len(keep) else keep
        if len(keep) > _MAX_STATES:
            exact = False
            keep = keep[np.sort(np.argsort(reduced[keep], kind="stable")[:_MAX_STATES])]
        if not len(keep):
            return None, exact
        cost, loss, reduced = cost[keep], loss[keep], reduced[keep]
        trail.append(np.divmod(keep, n))
    at, choice = int(np.argmin(loss)), [u[0] for u in units]
    for u, (origin, option) in zip(reversed(order), reversed(trail)):
        choice[u] = core[u][int(option[at])]
        at = int(origin[at])
    return choice, exact

"""EvoPress (arXiv 2410.14649): evolution over levels, with measured KL as fitness, started from the exact solution.

Each generation draws text of its own, the same for all candidates; the many are thinned on a little of it, the few and
their parent compared on more. Where the paper keeps whatever scored best, a child replaces its parent only when a
paired test over rows bears it out: two standard errors, or the search drifts on noise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

Choice = tuple[int, ...]

Fitness = Callable[[Choice, Sequence[int]], Tensor]
"""``fitness(choice, rows)``: KL of each of these rows of text, ``(R,)`` float64."""


@dataclass(frozen=True)
class Schedule:
    """How long and how wide the search is.

    Attributes:
        survivors: of the offspring that are scored on ``few_rows``, those scored again on ``many_rows``.
        patience: generations without an accepted child after which it stops.
    """

    generations: int = 20
    offspring: int = 16
    survivors: int = 3
    few_rows: int = 2
    many_rows: int = 8
    patience: int = 8


@dataclass(frozen=True)
class Evolved:
    """Attributes:
    accepted: children that replaced their parent.
    moved: units that differ from the start.
    history: mean paired gain and its standard error for each generation.
    """

    choice: Choice
    accepted: int
    moved: int
    history: list[tuple[float, float]] = field(default_factory=list)


def evolve(
    start: Choice, costs: Sequence[Sequence[int]], budget: int, fitness: Fitness, n_rows: int, *,
    schedule: Schedule, seed: int = 0, progress: Callable[[str, int, int], None] | None = None,
) -> Evolved:
    """Search from ``start`` among choices of total cost at most ``budget``.

    Args:
        costs: of the levels of each unit, rising; levels next to one another are what a mutation moves between.
        n_rows: rows of text that there are; each generation draws from them.
    """
    draw = random.Random(seed)
    parent, accepted, stale = start, 0, 0
    seen, history = {start}, []
    for generation in range(schedule.generations):
        children = []
        for _ in range(20 * schedule.offspring):
            child = mutate(parent, costs, budget, draw)
            if child is not None and child not in seen:
                seen.add(child)
                children.append(child)
            if len(children) == schedule.offspring:
                break
        if not children:
            break
        few = draw.sample(range(n_rows), min(schedule.few_rows, n_rows))
        children.sort(key=lambda c: (float(fitness(c, few).mean()), c))
        many = draw.sample(range(n_rows), min(schedule.many_rows, n_rows))
        before = fitness(parent, many)
        gains = [(before - fitness(c, many), c) for c in children[: schedule.survivors]]
        gain, best = max(gains, key=lambda g: (float(g[0].mean()), g[1]))
        mean, error = float(gain.mean()), _standard_error(gain)
        history.append((mean, error))
        stale += 1
        if mean > 2 * error and mean > 0:
            parent, accepted, stale = best, accepted + 1, 0
        if progress:
            progress("Evolving", generation + 1, schedule.generations)
        if stale >= schedule.patience:
            break
    return Evolved(parent, accepted, sum(a != b for a, b in zip(start, parent)), history)


def mutate(choice: Choice, costs: Sequence[Sequence[int]], budget: int, draw: random.Random) -> Choice | None:
    """One to three level switches: units go up, others go down until the budget holds, and what is left is spent.

    None where nothing can move.
    """
    levels = list(choice)
    spent = sum(c[i] for c, i in zip(costs, levels))
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        up = [u for u, i in enumerate(levels) if i + 1 < len(costs[u])]
        if not up:
            return None
        first = draw.choice(up)
        spent += costs[first][levels[first] + 1] - costs[first][levels[first]]
        levels[first] += 1
        while spent > budget:
            down = [u for u, i in enumerate(levels) if i > 0 and u != first]
            if not down:
                return None
            u = draw.choice(down)
            spent -= costs[u][levels[u]] - costs[u][levels[u] - 1]
            levels[u] -= 1
    left = budget - spent
    fits = [u for u, i in enumerate(levels) if i + 1 < len(costs[u]) and costs[u][i + 1] - costs[u][i] <= left]
    if fits:
        levels[draw.choice(fits)] += 1
    return tuple(levels) if tuple(levels) != choice else None


def _standard_error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("inf")

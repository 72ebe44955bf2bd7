"""The evolution keeps its budget, never gets worse, and finds the optimum of an additive fitness."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from fewbits.quant.allocate.evopress import Schedule, evolve, mutate
from fewbits.quant.allocate.knapsack import solve

_RNG = random.Random(1)
_COSTS = [[2 * s, 3 * s, 4 * s] for s in [_RNG.randint(1, 5) for _ in range(12)]]
_LOSSES = [[3 * _RNG.random() * 4.0**-i for i in range(3)] for _ in range(12)]
_LOSSES = [[max(row) * 4.0**-i for i in range(3)] for row in _LOSSES]
_START = (1,) * 12
_BUDGET = sum(c[1] for c in _COSTS)


def _fitness(choice: tuple[int, ...], rows: object) -> Tensor:
    value = sum(e[i] for e, i in zip(_LOSSES, choice))
    return torch.full((len(list(rows)),), value, dtype=torch.float64)  # type: ignore[call-overload]


def test_finds_the_optimum_of_an_additive_fitness() -> None:
    found = evolve(_START, _COSTS, _BUDGET, _fitness, 20, schedule=Schedule(generations=200, patience=80))
    best = solve(_COSTS, _LOSSES, _BUDGET).loss
    assert float(_fitness(found.choice, [0])[0]) <= best * (1 + 1e-9)
    assert found.accepted > 0 and found.moved > 0


def test_every_mutation_keeps_the_budget_and_moves_something() -> None:
    draw = random.Random(0)
    choice = _START
    reached = {choice}
    for _ in range(2000):
        child = mutate(choice, _COSTS, _BUDGET, draw)
        if child is None:
            continue
        assert child != choice and all(0 <= i < 3 for i in child)
        assert sum(c[i] for c, i in zip(_COSTS, child)) <= _BUDGET
        reached.add(choice := child)
    assert len(reached) > 500


def test_noise_alone_moves_nothing() -> None:
    noise = torch.Generator().manual_seed(0)

    def fitness(choice: tuple[int, ...], rows: object) -> Tensor:
        return 1 + 0.1 * torch.randn(8, generator=noise, dtype=torch.float64)

    found = evolve(_START, _COSTS, _BUDGET, fitness, 20, schedule=Schedule(generations=10, offspring=4))
    assert found.accepted <= 2  # 30 tests of two standard errors


def test_same_seed_same_search() -> None:
    runs = [evolve(_START, _COSTS, _BUDGET, _fitness, 20, schedule=Schedule(generations=15), seed=3) for _ in range(2)]
    assert runs[0] == runs[1]

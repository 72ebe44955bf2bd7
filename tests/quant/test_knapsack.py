"""The knapsack is exact: against brute force, and at the sizes of real models."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewbits.quant.allocate.knapsack import solve
from fewbits.quant.errors import BudgetError

_option = st.tuples(st.integers(1, 40), st.one_of(st.integers(0, 6), st.floats(0, 5, allow_nan=False)))
_units = st.lists(st.lists(_option, min_size=1, max_size=5), min_size=1, max_size=6)


@settings(deadline=None, max_examples=300)
@given(_units, st.floats(0, 1))
def test_optimal_against_brute_force(units: list, where: float) -> None:
    costs = [[c for c, _ in u] for u in units]
    losses = [[float(e) for _, e in u] for u in units]
    low, high = sum(map(min, costs)), sum(map(max, costs))
    budget = low + int(where * (high - low))
    found = solve(costs, losses, budget)
    best = min(
        sum(losses[u][o] for u, o in enumerate(pick))
        for pick in itertools.product(*[range(len(c)) for c in costs])
        if sum(costs[u][o] for u, o in enumerate(pick)) <= budget
    )
    assert found.exact
    assert found.loss == pytest.approx(best, abs=1e-12)
    assert found.cost == sum(costs[u][o] for u, o in enumerate(found.choice)) <= budget
    assert found.loss == pytest.approx(sum(losses[u][o] for u, o in enumerate(found.choice)))


def test_real_sizes_are_solved_exactly_and_fill_the_budget() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.choice([110592, 331776, 884736], 210)
    bits = [2.28, 3.3, 4.3, 5.3, 6.3, 8.3]
    costs = [[int(s * b / 8) for b in bits] for s in sizes]
    losses = [[float(k * s * 4.0**-b) for b in bits] for s, k in zip(sizes, np.exp(rng.normal(0, 1.5, 210)))]
    before = float("inf")
    for bpw in (2.5, 3.0, 3.5, 5.0):
        budget = int(bpw * sizes.sum() / 8)
        found = solve(costs, losses, budget)
        assert found.exact and 0.999 * budget < found.cost <= budget
        assert found.gap < 5e-3 * found.loss
        assert found.loss < before  # more bytes never hurt
        before = found.loss


def test_equal_units_get_equal_options() -> None:
    found = solve([[2, 3, 4]] * 8, [[4.0, 1.0, 0.25]] * 8, 24)
    assert set(found.choice) == {1}


def test_a_budget_out_of_reach_names_what_is() -> None:
    with pytest.raises(BudgetError, match="smallest that is reachable is 9"):
        solve([[4, 8], [5, 9]], [[1, 0], [1, 0]], 8)

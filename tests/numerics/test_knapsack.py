"""The knapsack against trying everything."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_compress.numerics.knapsack import assign

Item = list[tuple[int, float]]  # (cost, loss) of each option
ITEMS = st.lists(
    st.lists(st.tuples(st.integers(0, 40), st.floats(0, 1, width=32)), min_size=1, max_size=4), min_size=1, max_size=5
)


def split(items: list[Item]) -> tuple[list[list[int]], list[list[float]]]:
    return [[cost for cost, _ in item] for item in items], [[loss for _, loss in item] for item in items]


def best(items: list[Item], budget: int) -> float | None:
    """The least loss over every combination that fits."""
    fits = [c for c in itertools.product(*items) if sum(cost for cost, _ in c) <= budget]
    return min((sum(loss for _, loss in c) for c in fits), default=None)


@given(ITEMS, st.integers(0, 200))
@settings(max_examples=150, deadline=None)
def test_the_assignment_is_the_best_of_all(items: list[Item], budget: int) -> None:
    costs, losses = split(items)
    chosen, least = assign(costs, losses, budget), best(items, budget)
    if least is None:
        assert chosen is None
        return
    assert chosen is not None
    assert sum(options[i] for options, i in zip(costs, chosen, strict=True)) <= budget
    assert sum(options[i] for options, i in zip(losses, chosen, strict=True)) == pytest.approx(least, abs=2e-9)


@pytest.mark.parametrize("seed", range(6))
def test_real_sizes_and_losses_of_many_magnitudes(seed: int) -> None:
    """Costs of some hundred million bits, where a solver's tolerance is many weights; losses as bits give them."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1_000_000, 900_000_000, 7)
    bits = (2.56, 3.3, 4.3, 8.4)
    costs = [[int(size * b) for b in bits] for size in sizes]
    losses = [[float(10 ** draw.uniform(-6, 0) * 4.0**-b) for b in bits] for _ in sizes]
    budget = int(3.5 * sizes.sum())
    chosen = assign(costs, losses, budget)
    assert chosen is not None
    assert sum(options[i] for options, i in zip(costs, chosen, strict=True)) <= budget
    items = [list(zip(c, loss, strict=True)) for c, loss in zip(costs, losses, strict=True)]
    found = sum(options[i] for options, i in zip(losses, chosen, strict=True))
    assert found == pytest.approx(best(items, budget), rel=1e-6)


def test_a_budget_that_is_met_exactly_and_one_bit_less() -> None:
    costs, losses = [[10**12 + 1, 2 * 10**12], [10**12 + 3, 3 * 10**12]], [[1.0, 0.0], [1.0, 0.0]]
    exact = 2 * 10**12 + 10**12 + 3
    assert assign(costs, losses, exact) == [1, 0]
    assert assign(costs, losses, exact - 1) == [0, 0]
    assert assign(costs, losses, 2 * 10**12 + 4) == [0, 0]
    assert assign(costs, losses, 2 * 10**12 + 3) is None

"""Intervals against known values and against slow references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.statistics import Bootstrap, ratio_of_means, safe_exp, wilson


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [  # Newcombe 1998 (Statistics in Medicine 17), table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_has_the_published_limits(successes: int, trials: int, low: float, high: float) -> None:
    assert wilson(successes, trials) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize(("successes", "trials"), [(0, 7), (3, 10), (85, 100), (12, 12)])
def test_wilson_is_scipys_on_integers(successes: int, trials: int) -> None:
    found = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((found.low, found.high), abs=1e-12)


@given(st.integers(1, 500), st.data())
def test_wilson_holds_the_share_and_solves_its_equation(trials: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, trials))
    low, high = wilson(successes, trials)
    share = successes / trials
    assert 0 <= low <= share <= high <= 1
    for limit in (low, high):
        if 0 < limit < 1:  # |share - limit| = z sqrt(limit (1 - limit) / n)
            assert (share - limit) ** 2 == pytest.approx(1.959963984540054**2 * limit * (1 - limit) / trials, rel=1e-6)


def test_wilson_over_nothing_is_an_error() -> None:
    with pytest.raises(DscError, match="0 trials"):
        wilson(0, 0)


def test_bootstrap_equals_a_loop_over_the_same_draws() -> None:
    rng = np.random.default_rng(5)
    values, weights = rng.random(17), rng.random(17) + 0.5
    draws = Bootstrap(17, seed=3, resamples=400)
    samples = []
    for counts in draws.counts:
        picked = [index for index, count in enumerate(counts) for _ in range(int(count))]
        assert len(picked) == 17
        samples.append(sum(values[i] for i in picked) / sum(weights[i] for i in picked))
    assert draws.ratio(values, weights) == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])))


def test_interval_of_a_mean_is_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, size=4000)
    low, high = Bootstrap(4000, seed=1).ratio(values) or (0, 0)
    half = 1.96 * values.std() / np.sqrt(4000)
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)


def test_pairing_cancels_what_two_models_share() -> None:
    rng = np.random.default_rng(2)
    reference = (rng.random(1000) < 0.9).astype(float)
    model = reference.copy()
    model[np.flatnonzero(reference)[:10]] = 0.0  # fails on exactly ten more
    draws = Bootstrap(1000, seed=0)
    low, high = draws.difference(model, reference)
    assert -0.02 < low < -0.010 < high < -0.002
    alone = wilson(model.sum(), 1000)
    assert high - low < (alone[1] - alone[0]) / 2  # unpaired, the interval would be wider than either's own
    ratio = draws.ratio(model, reference)
    assert ratio is not None
    assert ratio[0] < ratio_of_means(list(model), list(reference)) < ratio[1] < 1  # type: ignore[operator]


def test_same_seed_same_interval_and_equal_models_differ_by_nothing() -> None:
    values = list(np.random.default_rng(1).random(50))
    assert Bootstrap(50, seed=4).ratio(values) == Bootstrap(50, seed=4).ratio(values)
    assert Bootstrap(50).difference(values, values) == (0.0, 0.0)
    assert Bootstrap(50).ratio(values, values) == (1.0, 1.0)


def test_a_ratio_to_nothing_is_unknown() -> None:
    assert Bootstrap(20).ratio([1.0] * 20, [0.0] * 20) is None
    assert ratio_of_means([1.0, 0.0], [0.0, 0.0]) is None
    with pytest.raises(DscError, match="0 units"):
        Bootstrap(0)
    with pytest.raises(ValueError, match="expected 20 values"):
        Bootstrap(20).ratio([1.0])


def test_perplexity_of_a_broken_model_does_not_overflow() -> None:
    assert safe_exp(1000.0) == float("inf")
    low, high = Bootstrap(10).exp_ratio([20.0] * 10, [10.0] * 10) or (0, 0)
    assert low == high == pytest.approx(np.exp(2.0))

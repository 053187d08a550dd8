"""Certainty against known values, brute force and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from deepseek_compress.evaluation import certainty, until
from deepseek_compress.evaluation.statistics import Bootstrap


@given(st.integers(0, 60), st.integers(0, 60))
def test_mid_p_lies_one_point_below_the_exact_test(lost: int, gained: int) -> None:
    p = certainty.mcnemar(lost, gained)
    if lost == gained:
        assert p == pytest.approx(1.0)
        return
    count, few = lost + gained, min(lost, gained)
    exact = binomtest(few, count).pvalue
    assert p == pytest.approx(exact - math.comb(count, few) / 2**count, abs=1e-12)
    assert certainty.mcnemar(gained, lost) == p


def constrained(lost: int, gained: int, count: int, difference: float) -> float:
    """The score statistic with the nuisance rate found by brute force."""
    rates = np.linspace(max(0.0, -difference), (1 - difference) / 2, 200_001)[1:-1]
    logs = gained * np.log(rates + difference) + lost * np.log(rates)
    logs += (count - lost - gained) * np.log(np.maximum(1 - 2 * rates - difference, 1e-300))
    rate = rates[logs.argmax()]
    return float((gained - lost - count * difference) / math.sqrt(count * (2 * rate + difference * (1 - difference))))


@pytest.mark.parametrize(("lost", "gained", "count"), [(20, 10, 1000), (3, 9, 40), (1, 5, 50), (8, 2, 25)])
def test_tango_inverts_the_score_test(lost: int, gained: int, count: int) -> None:
    low, high = certainty.tango(lost, gained, count)
    assert constrained(lost, gained, count, low) == pytest.approx(1.96, abs=2e-3)
    assert constrained(lost, gained, count, high) == pytest.approx(-1.96, abs=2e-3)
    other = certainty.tango(gained, lost, count)
    assert other == pytest.approx((-high, -low))


def test_the_limit_of_the_test_is_where_it_ends() -> None:
    for count in range(1, 80):
        few = int(certainty.critical(np.array([count]))[0])
        assert few < 0 or certainty.mcnemar(few, count - few) < 0.05
        assert certainty.mcnemar(few + 1, count - few - 1) >= 0.05


def test_no_flips_are_no_proof_of_no_difference() -> None:
    low, high = certainty.tango(0, 0, 1000)
    assert low == pytest.approx(-high)
    assert high == pytest.approx(1.96**2 / (1000 + 1.96**2), rel=1e-3)
    assert certainty.tango(7, 0, 7)[0] == -1.0
    found = certainty.paired([1.0, 0.0] * 50, [1.0, 0.0] * 50, Bootstrap(100))
    assert (found["p"], found["lost"], found["difference"]) == (1.0, 0, 0.0)
    assert found["hidden"] == pytest.approx(0.037, abs=1e-3)


def test_direction_and_pairing() -> None:
    """Mutants of sign and pairing: what the model loses is negative, and only the order of problems tells."""
    theirs = [1.0] * 60 + [0.0] * 40
    mine = [0.0] * 12 + [1.0] * 50 + [0.0] * 38
    found = certainty.paired(mine, theirs, Bootstrap(100))
    assert (found["lost"], found["gained"]) == (12, 2)
    assert found["difference"] == pytest.approx(-0.1)
    assert found["interval"][0] < -0.1 < found["interval"][1] < 0
    assert found["hidden"] == pytest.approx(-found["interval"][0])
    shuffled = certainty.paired(sorted(mine), theirs, Bootstrap(100))
    assert (shuffled["lost"], shuffled["gained"]) != (12, 2)


def test_power_equals_a_sum_over_all_outcomes() -> None:
    count, lost, gained, total = 30, 0.3, 0.1, 0.0
    for a in range(count + 1):
        for b in range(count + 1 - a):
            if certainty.mcnemar(a, b) < 0.05:
                ways = math.comb(count, a) * math.comb(count - a, b)
                total += ways * lost**a * gained**b * (1 - lost - gained) ** (count - a - b)
    assert certainty.power(count, lost, gained) == pytest.approx(total, abs=1e-9)
    assert certainty.power(50, 0.0, 0.0) == 0.0


def test_needed_problems_have_the_power_that_was_asked_for() -> None:
    for rate in (0.05, 0.2):
        count = certainty.needed(0.05, rate)
        assert certainty.power(count, (rate + 0.05) / 2, (rate - 0.05) / 2) >= 0.8
        assert certainty.power(int(count * 0.93), (rate + 0.05) / 2, (rate - 0.05) / 2) < 0.81
    assert certainty.needed(0.01, 0.2) > certainty.needed(0.01, 0.02) > 100


def test_holm_has_the_published_order() -> None:
    assert certainty.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert certainty.holm([]) == []
    rows = [{"p": 0.03}, {"p": 0.02}]
    certainty.correct(rows)
    assert [row["p_holm"] for row in rows] == pytest.approx([0.04, 0.04])


def test_sampled_scores_take_the_sign_flip_test() -> None:
    mine, theirs = [0.25, 0.5, 0.75] * 20, [0.5, 0.75, 1.0] * 20
    found = certainty.paired(mine, theirs, Bootstrap(60))
    assert found["p"] < 0.001
    assert found["difference"] == pytest.approx(-0.25)
    assert certainty.sign_flips([1.0] * 8 + [-1.0] * 2) == pytest.approx(binomtest(2, 10).pvalue, abs=0.01)
    assert certainty.sign_flips([0.0]) == 1.0


def test_until_ends_when_all_are_settled() -> None:
    assert until.looks(1000) == [250, 500, 1000]
    assert until.looks(100) == [100]
    reference = [1.0] * 8000
    worse = [0.0 if i % 10 == 0 else 1.0 for i in range(8000)]
    asked: list[tuple[str, int]] = []

    def scores(name: str, count: int) -> list[float]:
        asked.append((name, count))
        return {"ref": reference, "same": reference, "worse": worse}[name][:count]

    found = until.settle(1.0, 8000, "ref", ["worse"], scores)
    assert (found.problems, found.done) == (250, True)
    assert found.level == pytest.approx(0.05 / 6)
    assert until.settle(1.0, 8000, "ref", ["worse", "same"], scores).problems == 1000
    assert not until.settle(0.01, 8000, "ref", ["same"], scores).done


@pytest.mark.verify
@settings(max_examples=1)
@given(st.just(0))
def test_two_seeds_of_one_recipe_are_not_told_apart(seed: int) -> None:
    """At most 6 % of 2,000 comparisons of models with equal rates, at several rates of flips and sizes."""
    rng = np.random.default_rng(seed)
    for count, rate in ((200, 0.02), (200, 0.2), (1000, 0.05), (1000, 0.3)):
        draws = rng.multinomial(count, [rate / 2, rate / 2, 1 - rate], size=2000)
        found = np.mean([certainty.mcnemar(int(a), int(b)) < 0.05 for a, b, _ in draws])
        assert found <= 0.06, (count, rate, found)
        hidden = np.mean([not low <= 0 <= high for low, high in (certainty.tango(a, b, count) for a, b, _ in draws)])
        assert hidden <= 0.06, (count, rate, hidden)


@pytest.mark.verify
def test_power_is_as_foretold() -> None:
    rng = np.random.default_rng(1)
    for count, lost, gained in ((300, 0.06, 0.02), (1000, 0.03, 0.02), (1000, 0.05, 0.02), (3000, 0.03, 0.02)):
        draws = rng.multinomial(count, [lost, gained, 1 - lost - gained], size=2000)
        found = np.mean([certainty.mcnemar(int(a), int(b)) < 0.05 for a, b, _ in draws])
        assert found == pytest.approx(certainty.power(count, lost, gained), abs=0.03)


@pytest.mark.verify
def test_many_looks_find_no_more_than_one() -> None:
    rng, wrong = np.random.default_rng(2), 0
    for _ in range(500):
        flips = rng.choice([-1.0, 1.0, 0.0], p=[0.03, 0.03, 0.94], size=2000)
        mine, theirs = (flips > 0).astype(float), (flips < 0).astype(float)
        scores = {"m": mine, "r": theirs}
        found = until.settle(1.0, 2000, "r", ["m"], lambda name, count: list(scores[name][:count]))  # noqa: B023
        low, high = certainty.tango(int((flips[: found.problems] < 0).sum()), int((flips[: found.problems] > 0).sum()),
                                    found.problems, found.level)  # fmt: skip
        wrong += not low <= 0 <= high
    assert wrong / 500 <= 0.06

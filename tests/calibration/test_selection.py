"""Choosing windows: the criterion by brute force, quotas, ties, and the guarantee of the greedy choice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from deepseek_compress.calibration.selection import Candidates, Quota, by_coverage, by_quality, coverage


def pool(size: int, seed: int = 0) -> Candidates:
    generator = torch.Generator().manual_seed(seed)
    experts = torch.randint(0, 9, (size, 2, 4), generator=generator)
    return Candidates(
        torch.rand(size, generator=generator, dtype=torch.float64),
        torch.randn(size, 6, generator=generator, dtype=torch.float64),
        experts,
    )


def slowly(found: Candidates, count: int, alpha: float, beta: float) -> list[int]:
    """Q(x) as the module states it, window by window."""
    states = [state / math.sqrt(float(state @ state)) for state in found.states]
    mean = sum(states[1:], states[0]) / len(states)
    entropy = found.entropy.tolist()
    spread = max(entropy) - min(entropy)
    width = max(float((a - b).norm()) for a, b in itertools.product(states, states))
    chosen: list[int] = []
    for _ in range(count):
        scores = {}
        for i, state in enumerate(states):
            if i not in chosen:
                others = [states[j] for j in chosen] or [mean]
                nearest = min(float((state - other).norm()) for other in others)
                scores[i] = alpha * (entropy[i] - min(entropy)) / spread + beta * nearest / width
        chosen.append(max(scores, key=lambda i: scores[i]))
    return sorted(chosen)


@pytest.mark.parametrize(("alpha", "beta"), [(0.5, 0.5), (1, 0), (0, 1), (0.2, 3.0)])
@pytest.mark.parametrize("seed", range(4))
def test_quality_is_what_it_says(alpha: float, beta: float, seed: int) -> None:
    found = pool(12, seed)
    for count in (1, 5, 12):
        assert by_quality(found, count, alpha, beta) == slowly(found, count, alpha, beta)


def test_entropy_alone_takes_the_most_surprising() -> None:
    found = pool(20)
    assert by_quality(found, 6, 1, 0) == found.entropy.topk(6).indices.sort().values.tolist()


def test_diversity_alone_takes_one_of_each_kind() -> None:
    centres = torch.eye(6, dtype=torch.float64).repeat_interleave(5, 0)
    states = centres + 0.01 * torch.randn(30, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    chosen = by_quality(Candidates(torch.zeros(30), states, None), 6, 0, 1)
    assert sorted(i // 5 for i in chosen) == list(range(6))


def test_equal_windows_come_in_order() -> None:
    same = Candidates(torch.ones(5), torch.ones(5, 3), torch.ones(5, 1, 2, dtype=torch.long))
    assert by_quality(same, 3, 0.5, 0.5) == [0, 1, 2]
    assert same.experts is not None
    assert by_coverage(same.experts, 3) == [0, 1, 2]


def benefit(experts: Tensor, chosen: tuple[int, ...]) -> float:
    return float(experts[list(chosen)].sum(0).double().log1p().sum())


@given(st.integers(0, 1000), st.integers(1, 4))
def test_coverage_is_within_the_bound_of_the_best(seed: int, count: int) -> None:
    experts = pool(8, seed).experts
    assert experts is not None
    best = max(benefit(experts, chosen) for chosen in itertools.combinations(range(8), count))
    assert benefit(experts, tuple(by_coverage(experts, count))) >= (1 - 1 / math.e) * best


def test_coverage_asks_the_expert_that_few_ask() -> None:
    experts = torch.tensor([[[8, 0, 0]], [[8, 0, 0]], [[4, 4, 0]], [[7, 0, 1]]])
    assert by_coverage(experts, 2) == [2, 3]
    assert coverage(experts, [2, 3]) == {"unreached": 0, "fewest": 1, "median": 4, "most": 11}
    assert coverage(experts, [0, 1]) == {"unreached": 2, "fewest": 0, "median": 0, "most": 16}


def test_quotas_hold() -> None:
    found = pool(30)
    quota = Quota([i % 3 for i in range(30)], [4, 0, 3])
    assert found.experts is not None
    for chosen in (by_quality(found, 7, 0.5, 0.5, quota), by_coverage(found.experts, 7, quota)):
        assert [sum(i % 3 == source for i in chosen) for source in range(3)] == [4, 0, 3]

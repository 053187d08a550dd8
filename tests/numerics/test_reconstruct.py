"""Coordinate descent over fours: each step is the best there is, and the target is what the original computes."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch

from deepseek_compress.numerics import hessian
from deepseek_compress.numerics.hessian import layer_error
from deepseek_compress.numerics.reconstruct import Reconstruct, descend
from deepseek_compress.numerics.sparsegpt import SparseGpt
from deepseek_compress.numerics.types import Statistics
from tests.numerics.reference import correlated


def test_of_one_four_it_finds_the_best_of_all_masks() -> None:
    weight, h = correlated(7, 4, seed=3)
    h = hessian.damped(h, 0.01)
    found = descend(weight.t().contiguous(), torch.zeros(4, 7), h, 1).t()
    for row, ours in zip(weight.double(), found.double(), strict=True):
        errors = []
        for kept in combinations(range(4), 2):
            best, own = torch.zeros(4, dtype=torch.float64), list(kept)
            best[own] = torch.linalg.solve(h.double()[own][:, own], (h.double() @ row)[own])
            errors.append(float((row - best) @ h.double() @ (row - best)))
        assert float((row - ours) @ h.double() @ (row - ours)) == pytest.approx(min(errors), rel=1e-4)


@pytest.mark.parametrize("columns", [64, 132, 200])  # over the borders of blocks, and a block that is not whole
def test_no_sweep_raises_the_error_and_many_end_where_no_four_can_be_better(columns: int) -> None:
    weight, h = correlated(9, columns, seed=columns)
    h = hessian.damped(h, 0.01)
    target = weight.t().contiguous()
    values = SparseGpt()(weight, Statistics(1, h)).t().contiguous()
    errors = [layer_error(target.t(), values.t(), h)]
    for _ in range(40):
        values = descend(target, values, h, 1)
        errors.append(layer_error(target.t(), values.t(), h))
        assert errors[-1] <= errors[-2] * (1 + 1e-5)
    assert errors[-1] < 0.9 * errors[0]
    assert bool(((values.t().reshape(9, -1, 4) == 0).sum(-1) == 2).all())
    pull = (h @ (target - values)).abs() / (h @ target).abs().mean()
    assert float(pull[values != 0].max()) < 0.02, "the weights that stay are the least squares of their mask"


def test_it_matches_what_the_original_computes_from_its_own_inputs() -> None:
    """X* enters the original, X the sparse model: ||W X* - V X|| is what counts, on tokens of the same kind."""
    generator = torch.Generator().manual_seed(2)
    weight, _ = correlated(12, 64, seed=2)
    mix = torch.randn(64, 64, generator=generator) / 8
    lost = torch.eye(64) - 0.4 * torch.diag(torch.rand(64, generator=generator))  # what layers before it did
    theirs = torch.randn(4000, 64, generator=generator) @ mix
    ours = theirs @ lost
    first, rest = slice(0, 1000), slice(1000, 2000)

    def sums(some: slice) -> tuple[torch.Tensor, torch.Tensor]:
        return ours[some].T @ ours[some], (theirs - ours)[some].T @ ours[some]

    half, other = sums(first), sums(rest)
    both = [a + b for a, b in zip(half, other, strict=True)]
    given = Statistics(
        2000, both[0], cross_covariance=both[1], half=Statistics(1000, half[0], cross_covariance=half[1])
    )

    def missed(found: torch.Tensor) -> float:
        return float((theirs[2000:] @ weight.T - ours[2000:] @ found.T).square().sum())

    plain = Statistics(2000, both[0])
    assert missed(Reconstruct()(weight, given)) < 0.8 * missed(Reconstruct()(weight, plain))
    assert missed(Reconstruct()(weight, plain)) < missed(SparseGpt()(weight, plain))
    assert torch.equal(Reconstruct(strength=0)(weight, given), Reconstruct()(weight, plain)), "corrected or not"

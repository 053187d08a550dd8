"""GPTQ and SparseGPT against the papers' formulas with every inverse written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from deepseek_compress.numerics import grid, hessian, pattern
from deepseek_compress.numerics.gptq import Gptq, solving_order
from deepseek_compress.numerics.magnitude import Magnitude
from deepseek_compress.numerics.sparsegpt import SparseGpt
from deepseek_compress.numerics.types import Factor, Statistics
from tests.numerics.reference import correlated, obs


def plain_gptq(weight: Tensor, h: Tensor, knobs: Gptq, size: int) -> Tensor:
    """GPTQ with inverses: the same grids, fitted where the paper's code fits them, everything else spelled out."""
    order = solving_order(h, knobs.act_order, size)
    zeros = (weight == 0)[:, order] if pattern.holds(weight) else torch.zeros_like(weight, dtype=torch.bool)
    grids: dict[int, grid.Grid] = {}

    def begin(j: int, updated: Tensor, cost: Callable[[int], Tensor]) -> None:
        group = int(order[j]) // size
        if group in grids:
            return
        if knobs.act_order == "column":  # by the original weights; the costs are those of the group's own columns
            steps = [int((order == c).nonzero()) for c in range(group * size, group * size + size)]
            values = weight[:, group * size : group * size + size].t()
        else:
            steps = list(range(j, j + size))
            values = updated[:, j : j + size].masked_fill(zeros[:, j : j + size], 0).float().t()
        costs = torch.stack([cost(k) for k in steps]).float()[:, None]
        grids[group] = grid.search(values, 4, knobs.symmetric, costs) if knobs.mse else grid.minmax(values, 4, False)

    def choose(j: int, w: Tensor) -> Tensor:
        own = grids[int(order[j]) // size]
        value = (w / own.scale).round().clamp(-own.zero_point, 15 - own.zero_point) * own.scale
        return value.masked_fill(zeros[:, j], 0)

    result = torch.empty_like(weight)
    result[:, order] = obs(weight[:, order], hessian.damped(h, knobs.damping)[order][:, order], choose, begin).float()
    return result


@pytest.mark.parametrize("act_order", ["none", "group", "column"])
@pytest.mark.parametrize("mse", [False, True])
@pytest.mark.parametrize(("columns", "size"), [(192, 32), (160, 160), (320, 160)])  # within and across blocks of 128
def test_gptq_is_the_papers(act_order: str, mse: bool, columns: int, size: int) -> None:
    weight, h = correlated(6, columns)
    knobs = Gptq(act_order=act_order, mse=mse, group_size=size)  # type: ignore[arg-type]
    assert_same_but_for_ties(knobs(weight, Statistics(1, h)).dequantize(), plain_gptq(weight, h, knobs, size))


def test_the_factor_of_several_panels_is_the_librarys() -> None:
    _, h = correlated(4, 600)
    wanted = hessian.damped(h, 0.01)
    found = wanted.clone()
    assert hessian._cholesky(found)
    torch.testing.assert_close(found.triu(), torch.linalg.cholesky(wanted, upper=True), rtol=1e-3, atol=1e-4)


def test_columns_of_most_input_are_solved_first_by_groups_or_one_by_one() -> None:
    hessian = torch.diag(torch.tensor([1.0, 5.0, 2.0, 9.0, 1.0, 1.0]))
    orders = {order: solving_order(hessian, order, 3).tolist() for order in ("none", "group", "column")}
    assert orders == {"none": [0, 1, 2, 3, 4, 5], "group": [3, 4, 5, 1, 2, 0], "column": [3, 1, 2, 0, 4, 5]}


@pytest.mark.parametrize("act_order", ["none", "group", "column"])
def test_gptq_of_a_sparse_weight_is_the_papers(act_order: str) -> None:
    weight, h = correlated(6, 192, seed=3)
    sparse = Magnitude()(weight, Statistics())
    knobs = Gptq(act_order=act_order, group_size=64)  # type: ignore[arg-type]
    result = knobs(sparse, Statistics(1, h))
    assert bool((result.dequantize()[sparse == 0] == 0).all())
    assert bool((result.codes.view(6, 3, 64) == result.zero_point[..., None])[(sparse == 0).view(6, 3, 64)].all())
    assert_same_but_for_ties(result.dequantize(), plain_gptq(sparse, h, knobs, 64))


def assert_same_but_for_ties(fast: Tensor, slow: Tensor) -> None:
    """Equal in nearly every row: float32 against float64 may turn one tie, after which that row goes its own way."""
    same = torch.isclose(fast, slow, rtol=1e-5, atol=1e-6).all(1)
    assert int((~same).sum()) <= 1, f"rows that differ: {(~same).nonzero().flatten().tolist()}"


def test_sparsegpt_is_the_papers() -> None:
    weight, h = correlated(16, 192, seed=5)
    masks: dict[int, Tensor] = {}

    def begin(j: int, updated: Tensor, cost: Callable[[int], Tensor]) -> None:
        if j % 4 == 0:
            costs = torch.stack([cost(k) for k in range(j, j + 4)])
            score = updated[:, j : j + 4] ** 2 * costs
            masks[j] = torch.zeros_like(score).scatter_(1, score.topk(2, dim=1).indices, 1.0)

    def choose(j: int, w: Tensor) -> Tensor:
        return w * masks[j - j % 4][:, j % 4]

    slow = obs(weight, hessian.damped(h, 0.01), choose, begin)
    fast = SparseGpt()(weight, Statistics(1, h))
    assert torch.allclose(fast.double(), slow, rtol=1e-3, atol=1e-4 * float(slow.abs().max()))
    assert bool(((fast == 0).view(16, -1, 4).sum(-1) == 2).all())


def test_solver_keeps_the_weight_that_needs_no_rounding() -> None:
    weight, h = correlated(5, 130)
    factor = hessian.factorize(h, torch.arange(130), 0.01)

    def exact(start: int, base: Tensor, residual: Tensor) -> None:
        assert torch.equal(base, weight.t()[start : start + len(base)]), "nothing is fed forward"
        residual[start : start + len(base)] = 0

    assert bool((hessian.solve(weight.t().contiguous(), factor, exact, width=32) == 0).all())


@pytest.mark.parametrize(("columns", "width", "cut"), [(700, 48, 64), (1300, 128, 160), (1100, 128, None)])
def test_solver_feeds_every_column_with_all_earlier_errors(columns: int, width: int, cut: int | None) -> None:
    """Over the borders of blocks and panels, against the definition in float64; errors are given, not rounded."""
    generator = torch.Generator().manual_seed(1)
    target, errors = (torch.randn(columns, 3, generator=generator) for _ in range(2))
    feedback = (torch.randn(columns, columns, generator=generator) / columns**0.5).tril(-1)
    factor = Factor(torch.arange(columns), feedback, torch.ones(columns), ())
    due = target.double() + feedback.double() @ errors.double()
    seen = []

    def fix(start: int, base: Tensor, residual: Tensor) -> None:
        steps = slice(start, start + len(base))
        inside = feedback[steps, steps].double() @ errors[steps].double()
        assert torch.allclose(base.double() + inside, due[steps], atol=1e-4)
        residual[steps] = errors[steps]
        seen.append((start, start + len(base)))

    assert torch.equal(hessian.solve(target, factor, fix, width, cut), errors)
    assert [b for _, b in seen[:-1]] == [a for a, _ in seen[1:]], "every column once"
    assert all(b - a <= width and (cut is None or a // cut == (b - 1) // cut) for a, b in seen)


def test_factor_is_the_hessian() -> None:
    _, h = correlated(1, 96)
    order = solving_order(h, "group", 32)
    factor = hessian.factorize(h, order, 0.01)
    root = factor.feedback.double() + torch.eye(96, dtype=torch.float64)
    damped = hessian.damped(h, 0.01)[order][:, order].double()
    assert torch.equal(factor.feedback, factor.feedback.tril(-1))
    assert torch.allclose(root.t() @ torch.diag(factor.cost.double()) @ root, damped, rtol=1e-4, atol=1e-3)


def test_damping_escalates_until_the_factor_exists() -> None:
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    indefinite = x.t() @ x - 0.05 * torch.eye(64)
    factor = hessian.factorize(indefinite, torch.arange(64), 1e-5)
    assert bool(factor.feedback.isfinite().all())
    assert bool((factor.cost > 0).all())


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (torch.nan, "NaN or infinite in 2 of 64 columns"),
        (torch.inf, "NaN or infinite in 2 of 64 columns"),
        (3e38, "sums to more than float32 holds"),
    ],
)
def test_a_hessian_without_a_factor_is_refused(value: float, told: str) -> None:
    h = torch.eye(64)
    h[3, 3] = h[7, 7] = value
    with pytest.raises(hessian.Unsolvable, match=told):
        hessian.factorize(h, torch.arange(64), 0.01)
    with pytest.raises(hessian.Unsolvable, match="no Cholesky factor"):
        hessian.factorize(torch.eye(64) + 1e30 * (1 - torch.eye(64)), torch.arange(64), 0.0)


@pytest.mark.parametrize("act_order", ["none", "group", "column"])
def test_dead_columns_are_rounded_to_nearest_and_feed_nothing(act_order: str) -> None:
    weight, h = correlated(6, 128, seed=7)
    dead = torch.tensor([0, 17, 90])
    h[dead], h[:, dead] = 0, 0
    result = Gptq(group_size=32, act_order=act_order)(weight, Statistics(1, h))  # type: ignore[arg-type]
    scale = result.scale.repeat_interleave(32, 1)
    values, zero = result.dequantize(), result.zero_point.repeat_interleave(32, 1).float()
    nearest = (weight / scale).round().clamp(-zero, 15 - zero) * scale
    assert torch.allclose(values[:, dead], nearest[:, dead], atol=1e-6)


def test_a_hessian_no_token_reached_means_round_to_nearest() -> None:
    weight, _ = correlated(6, 128)
    result = Gptq(group_size=32)(weight, Statistics(0, torch.zeros(128, 128)))
    groups = grid.columns_first(weight, 32)
    plain = grid.quantized(groups, grid.search(groups, 4, False), 4, False)
    assert torch.allclose(result.dequantize(), plain.dequantize(), atol=1e-5)


def test_keep_two_breaks_ties_the_same_way() -> None:
    score = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 5], [1, 0, 0, 5], [1, 2, 0, 5]])  # (4, rows)
    assert pattern.keep_two(score).int().tolist() == [[1, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 1], [0, 1, 0, 0]]

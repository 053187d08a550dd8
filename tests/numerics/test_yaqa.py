"""YAQA against its recursion written row by row, and against what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_compress.numerics import yaqa
from deepseek_compress.numerics.gptaq import corrected
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.hessian import damped
from deepseek_compress.numerics.magnitude import Magnitude
from deepseek_compress.numerics.types import Statistics
from deepseek_compress.numerics.yaqa import Yaqa, YaqaGptaq
from tests.numerics.reference import correlated


def outputs(rows: int, seed: int = 5) -> Tensor:
    """An output Hessian (1, rows, rows) with strong correlations."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.randn(4 * rows, rows // 4, generator=generator) @ torch.randn(rows // 4, rows, generator=generator)
    return (g.t() @ g / len(g))[None]


def plain(weight: Tensor, h: Tensor, g: Tensor, knobs: Yaqa) -> Tensor:
    """One row after the other, the least important last; each target is the minimum of tr(G E H E^T) over that row."""
    g = damped(g, knobs.output_damping).double()
    order = torch.argsort(g.diagonal(), descending=True, stable=True).tolist()
    error = torch.zeros_like(weight, dtype=torch.float64)
    result = torch.zeros_like(weight)
    for place, row in enumerate(order):
        done, rest = order[:place], order[place:]
        # with the later rows free, the best error of `rest` answers that of `done` by the Schur complement
        answer = -torch.linalg.solve(g[rest][:, rest], g[rest][:, done] @ error[done]) if done else error[rest] * 0
        target = weight[row] - answer[0].float()
        rounded = Gptq(group_size=32)(target[None], Statistics(1, h)).dequantize()[0]
        result[row], error[row] = rounded, (weight[row] - rounded).double()
    return result


def test_rows_answer_the_errors_before_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaqa, "BLOCK", 1)
    weight, h = correlated(12, 64)
    g = outputs(12)
    found = Yaqa(group_size=32)(weight, Statistics(1, h, output_hessian=g)).dequantize()
    differing = (found - plain(weight, h, g[0], Yaqa(group_size=32))).abs() > 1e-4
    assert float(differing.float().mean()) < 0.02, "ties of rounding may fall either way"


def cost(weight: Tensor, result: Tensor, h: Tensor, g: Tensor) -> float:
    error = (weight - result).double()
    return float(torch.trace(g.double() @ error @ h.double() @ error.t()))


@pytest.mark.parametrize("parts", [1, 2])
def test_the_model_notices_less_than_of_gptq(parts: int) -> None:
    weight, h = correlated(128, 64)
    g = torch.cat([outputs(128 // parts, seed) for seed in range(parts)])
    by_gptq = Gptq(group_size=32)(weight, Statistics(1, h)).dequantize()
    by_yaqa = Yaqa(group_size=32)(weight, Statistics(1, h, output_hessian=g)).dequantize()
    whole = torch.block_diag(*g)
    assert cost(weight, by_yaqa, h, whole) < 0.75 * cost(weight, by_gptq, h, whole)


def test_without_output_hessians_it_is_gptq() -> None:
    weight, h = correlated(40, 64)
    same = Yaqa(group_size=32)(weight, Statistics(1, h))
    assert torch.equal(same.codes, Gptq(group_size=32)(weight, Statistics(1, h)).codes)
    alike = Statistics(1, h, output_hessian=torch.eye(40)[None])  # every output counts the same
    assert torch.equal(Yaqa(group_size=32)(weight, alike).codes, same.codes)


def test_zeros_of_a_sparse_weight_stay() -> None:
    weight, h = correlated(48, 64)
    sparse = Magnitude()(weight, Statistics())
    result = Yaqa(group_size=32)(sparse, Statistics(1, h, output_hessian=outputs(48))).dequantize()
    assert bool((result[sparse == 0] == 0).all())


def test_with_gptaq_it_rounds_the_corrected_target() -> None:
    weight, h = correlated(40, 64)
    drift = 0.05 * h @ torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) / 8
    given = Statistics(1, h, cross_covariance=drift, output_hessian=outputs(40))
    found = YaqaGptaq(group_size=32, strength=0.5)(weight, given)
    factor = Gptq(group_size=32).prepare(given).factor
    assert factor is not None
    target = corrected(weight, given, factor, 0.5)
    assert torch.equal(found.codes, Yaqa(group_size=32)(target, given).codes)
    assert not torch.equal(found.codes, Yaqa(group_size=32)(weight, given).codes)

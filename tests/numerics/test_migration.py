"""The scales of SmoothQuant by its formula, one channel at a time, and what rounding them to powers of two keeps."""

from __future__ import annotations

import pytest
import torch

from deepseek_compress.numerics import MIGRATION
from deepseek_compress.numerics.migration import LARGEST, SmoothQuant, power_of_two
from deepseek_compress.numerics.types import Statistics
from tests.numerics.reference import correlated


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_smoothquant_is_equation_4(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, 7, generator=generator) for rows in (5, 9)]
    x = 10 * torch.randn(30, 7, generator=generator)
    method = SmoothQuant(alpha=alpha)
    found = method.scales([method.kept(w) for w in weights], Statistics(30, input_absmax=x.abs().amax(0)))
    for j in range(7):
        largest = max(abs(float(v)) for w in weights for v in w[:, j])
        want = max(abs(float(v)) for v in x[:, j]) ** alpha / largest ** (1 - alpha)
        assert float(found[j]) == pytest.approx(want, rel=1e-5)


def test_channels_without_inputs_or_weights_stay_finite() -> None:
    seen, kept = torch.tensor([0.0, 1.0, 1e30]), torch.tensor([[1.0, 0.0, 1e-30]])
    found = SmoothQuant().scales([kept], Statistics(1, input_absmax=seen))
    assert float(found[0]) == 1
    assert float(found[1]) <= LARGEST
    assert float(found[2]) == LARGEST


@pytest.mark.parametrize("name", MIGRATION)
def test_every_method_gives_positive_scales(name: str) -> None:
    weight, hessian = correlated(16, 128)
    size = hessian.diagonal().sqrt()
    method = MIGRATION[name]()
    before = weight.clone()
    found = method.scales([method.kept(weight)], Statistics(512, hessian, size, size / 2))
    assert found.shape == (128,)
    assert bool((found > 0).all())
    assert torch.equal(weight, before), "inputs are not modified"
    assert method.paper
    halves = power_of_two(found)
    assert bool((halves.log2() == halves.log2().round()).all())
    assert bool((halves / found).log2().abs().max() <= 0.501)

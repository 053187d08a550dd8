"""What a change cost: exact for few rows, from a sample of many."""

from __future__ import annotations

import pytest
import torch

from deepseek_compress.compress.solver import SAMPLED, measure, sampled
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Statistics


@pytest.mark.parametrize("rows", [SAMPLED - 1, 40 * SAMPLED + 3])
def test_errors_are_those_of_their_definition(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    weight = torch.randn(rows, 96, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight[:, 3] = 0
    stored = Rtn(group_size=32)(weight, Statistics())
    loaded = stored.dequantize()
    found = measure(weight, stored, Statistics(300, x.t() @ x))
    off = (weight - loaded).double()
    assert found["weight_error"] == pytest.approx(float(off.square().sum() / weight.double().square().sum()), rel=1e-5)
    lost, whole = (x.double() @ off.t()).square().sum(0), (x.double() @ weight.double().t()).square().sum(0)
    chosen = sampled(rows)
    assert found["output_error"] == pytest.approx(float(lost[chosen].sum() / whole[chosen].sum()), rel=1e-4)
    assert found["output_error"] == pytest.approx(float(lost.sum() / whole.sum()), rel=0.15)
    assert found["zeros"] == pytest.approx(float((loaded == 0).double().mean()), abs=1e-9)
    assert found["weights"] == weight.numel()
    assert found["bits"] == 4 + 20 / 32


def test_without_tokens_or_with_a_16_bit_weight() -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    found = measure(weight, weight.bfloat16(), Statistics())
    assert found["output_error"] is None
    assert 0 < found["weight_error"] < 1e-4
    assert found["bits"] == 16
    assert measure(weight * 0, weight.bfloat16() * 0, Statistics(1, torch.eye(64)))["output_error"] == 0


def test_the_sample_is_fixed_and_without_a_period() -> None:
    rows = sampled(24576)
    assert torch.equal(rows, sampled(24576))
    assert len(set(rows.tolist())) == SAMPLED
    assert len(set((rows % 192).tolist())) > SAMPLED // 2, "heads of 192 rows: not the same one of each"

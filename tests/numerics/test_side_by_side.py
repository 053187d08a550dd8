"""Matrices that are solved together get the bits that each gets alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_compress.numerics import side_by_side
from deepseek_compress.numerics.gptaq import Gptaq
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.magnitude import Magnitude
from deepseek_compress.numerics.types import Quantized, Statistics


def inputs(columns: int, count: int, tokens: int = 0) -> list[Statistics]:
    generator = torch.Generator().manual_seed(columns)
    found = []
    for _ in range(count):
        x = torch.randn(tokens or 2 * columns, columns, generator=generator) * torch.rand(columns, generator=generator)
        found.append(Statistics(len(x), x.T @ x))
    return found


def weights(rows: int, columns: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(rows, columns, generator=generator) for _ in range(count)]


def same(found: Quantized, wanted: Quantized) -> bool:
    return all(torch.equal(mine, theirs) for mine, theirs in zip(found[:3], wanted[:3], strict=True))


@pytest.mark.parametrize(
    ("columns", "knobs"),
    [
        (320, {"group_size": 32}),  # more than one panel of the factor, and of the feedback
        (640, {"group_size": 128, "num_bits": 3}),
        (384, {"group_size": None, "act_order": "none", "symmetric": True}),
        (512, {"group_size": 256}),  # a group of several blocks
    ],
)
def test_together_is_alone(columns: int, knobs: dict[str, object]) -> None:
    gptq = Gptq.model_validate(knobs)
    statistics, own = inputs(columns, 3), weights(48, columns, 3)
    assert side_by_side.fits(own, [gptq] * 3)
    prepared = side_by_side.prepare(gptq, statistics)
    for mine, its in zip(prepared, statistics, strict=True):
        factor = gptq.prepare(its).factor
        assert mine.factor is not None
        assert factor is not None
        assert torch.equal(mine.factor.feedback, factor.feedback)
        assert torch.equal(mine.factor.cost, factor.cost)
        assert mine.factor.key == factor.key
    for found, weight, its in zip(side_by_side.quantize(gptq, own, prepared), own, statistics, strict=True):
        assert same(found, gptq(weight, gptq.prepare(its)))


def test_one_that_needs_more_damping_gets_it() -> None:
    """A Hessian of rank one has no factor at this damping; its neighbours keep theirs."""
    gptq = Gptq(group_size=32, damping=0.0)
    statistics = [inputs(64, 1)[0], Statistics(9, torch.ones(64, 64)), inputs(64, 2)[1]]
    prepared = side_by_side.prepare(gptq, statistics)
    for mine, its in zip(prepared, statistics, strict=True):
        factor = gptq.prepare(its).factor
        assert mine.factor is not None
        assert factor is not None
        assert torch.equal(mine.factor.feedback, factor.feedback)


def test_what_is_not_solved_together() -> None:
    gptq, own = Gptq(group_size=32), weights(16, 64, 2)
    assert side_by_side.fits(own, [gptq, gptq])
    assert not side_by_side.fits(own, [gptq, Gptq(group_size=64)])
    assert not side_by_side.fits(own, [Gptaq(group_size=32)] * 2)
    assert not side_by_side.fits(own, [Gptq(group_size=32, act_order="column")] * 2)
    assert not side_by_side.fits([own[0], own[1][:8]], [gptq, gptq])
    assert not side_by_side.fits([own[0], Magnitude()(own[1], Statistics())], [gptq, gptq])

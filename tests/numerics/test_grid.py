"""Grids: half a step at most, zero exactly, the stored scale, and the search against a plain loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.numerics import grid
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Statistics


@st.composite
def weights(draw: st.DrawFn) -> Tensor:
    rows, groups, seed = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, groups * 32, generator=generator) * 10.0 ** draw(st.integers(-6, 3))
    weight += draw(st.sampled_from([0.0, 1.0, -5.0])) * weight.std()
    weight[torch.rand(weight.shape, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 0
    return weight


@given(weights(), st.integers(2, 8), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_half_a_step_inside_the_range_and_zero_exactly(weight: Tensor, bits: int, symmetric: bool, mse: bool) -> None:
    result = Rtn(num_bits=bits, group_size=32, symmetric=symmetric, mse=mse)(weight, Statistics())
    rows, groups = result.scale.shape
    w = weight.view(rows, groups, 32).double()
    scale, zero = result.scale[..., None].double(), result.zero_point[..., None].double()
    low, high = -zero * scale, (2**bits - 1 - zero) * scale
    inside = (w >= low) & (w <= high)
    error = (result.dequantize().view_as(w).double() - w).abs()
    assert bool((error <= scale * (0.5 + 1e-5))[inside].all())
    assert bool((error <= torch.maximum(low - w, w - high) + scale * 1e-5)[~inside].all())  # outside: the nearest end
    assert bool((result.dequantize()[weight == 0] == 0).all())
    if not mse:  # the range covers every weight but for the rounding of scale and zero point
        assert bool((error <= scale).all())


@given(weights(), st.booleans())
@settings(max_examples=20, deadline=None)
def test_what_is_stored(weight: Tensor, symmetric: bool) -> None:
    result = Rtn(group_size=32, symmetric=symmetric)(weight, Statistics())
    assert result.codes.dtype == result.zero_point.dtype == torch.uint8
    assert torch.equal(result.scale, result.scale.bfloat16().float())
    assert bool((result.scale > 0).all())
    assert int(result.codes.max()) <= 15
    assert int(result.zero_point.max()) <= 15
    assert result.symmetric == symmetric
    assert not symmetric or bool((result.zero_point == 8).all())


def test_layout_of_codes() -> None:
    """Codes against the definition, one weight at a time."""
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    result = Rtn(group_size=32)(weight, Statistics())
    for row in range(3):
        for g in range(2):
            group = weight[row, g * 32 : g * 32 + 32]
            low, high = min(float(group.min()), 0.0), max(float(group.max()), 0.0)
            scale = torch.tensor((high - low) / 15).bfloat16().float()
            zero = round(-low / float(scale))
            assert result.scale[row, g] == scale
            assert result.zero_point[row, g] == zero
            codes = [min(max(round(float(w) / float(scale)) + zero, 0), 15) for w in group]
            assert result.codes[row, g * 32 : g * 32 + 32].tolist() == codes
    assert torch.allclose(result.dequantize(), weight, atol=float(result.scale.max()))


@pytest.mark.parametrize("symmetric", [False, True])
def test_search_is_the_best_of_its_candidates(symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    groups = torch.randn(5, 32, 7, generator=generator) ** 3
    importance = torch.rand(5, 32, 1, generator=generator)
    found = grid.search(groups, 4, symmetric, importance, steps=6, least=0.5)
    for g in range(5):
        for row in range(7):
            w, share = groups[g, :, row], importance[g, :, 0]
            errors = []
            for shrink in (1, 0.9, 0.8, 0.7, 0.6, 0.5):
                one = grid.fit(w.min()[None] * shrink, w.max()[None] * shrink, 4, symmetric)
                value = ((w / one.scale).round().clamp(-one.zero_point, 15 - one.zero_point)) * one.scale
                errors.append(float((share * (value - w) ** 2).sum()))
            zero, scale = found.zero_point[g, row], found.scale[g, row]
            value = (w / scale).round().clamp(-zero, 15 - zero) * scale
            assert float((share * (value - w) ** 2).sum()) <= min(errors) * (1 + 1e-5)


def test_search_of_one_group_is_that_of_many() -> None:
    groups = torch.randn(9, 32, 7, generator=torch.Generator().manual_seed(3))
    importance = torch.rand(9, 32, 1, generator=torch.Generator().manual_seed(4))
    whole = grid.search(groups, 4, False, importance)
    for g in range(9):
        alone = grid.search(groups[g], 4, False, importance[g])
        assert torch.equal(whole.scale[g], alone.scale)
        assert torch.equal(whole.zero_point[g], alone.zero_point)


def test_group_size_that_does_not_divide() -> None:
    with pytest.raises(DscError, match="10944 columns do not divide into groups of 128; set group_size: 64"):
        grid.fit_group_size(10944, 128)
    assert [grid.fit_group_size(n, None) for n in (256, 576, 96, 50)] == [128, 64, 32, 50]

"""Rounding of keys and values against the slow formula, one number at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_compress.numerics.kv_cache import ANCHOR, KvRounding


def slow(values: list[float], num_bits: int) -> list[float]:
    """One group: scale in BF16, whole zero point, codes of 0 .. 2**b - 1."""
    top = 2**num_bits - 1
    low, high = min(0.0, *values), max(0.0, *values)
    scale = torch.tensor((high - low) / top).bfloat16().float()
    zero = torch.round(torch.tensor(-low) / scale).clamp(0, top)
    codes = [(torch.round(torch.tensor(v) / scale) + zero).clamp(0, top) for v in values]
    return [float((code - zero) * scale) for code in codes]


def keys(tokens: int, heads: int = 2, channels: int = 8, seed: int = 0) -> Tensor:
    """(1, heads, tokens, channels) with channels that are large in every token."""
    generator = torch.Generator().manual_seed(seed)
    offset = 5 * torch.randn(heads, 1, channels, generator=generator)
    return (offset + torch.randn(heads, tokens, channels, generator=generator)).unsqueeze(0)


@pytest.mark.parametrize("num_bits", [4, 8])
def test_each_group_of_a_token_and_head_has_its_grid(num_bits: int) -> None:
    x = keys(3)
    found = KvRounding(num_bits=num_bits, group_size=4)(x)
    for row, want in zip(found.reshape(-1, 4), x.reshape(-1, 4), strict=True):
        assert row.tolist() == slow(want.tolist(), num_bits)


def test_a_kept_token_has_two_layers_of_four_bits() -> None:
    x, both = keys(3), KvRounding(num_bits=8, group_size=4, window=2, rest=4)
    for row, want in zip(both(x).reshape(-1, 4), x.reshape(-1, 4).tolist(), strict=True):
        first = slow(want, 4)
        second = slow([w - f for w, f in zip(want, first, strict=True)], 4)
        assert row.tolist() == pytest.approx([f + s for f, s in zip(first, second, strict=True)], abs=1e-6)


def test_deltas_are_taken_to_the_stored_key_and_begin_again() -> None:
    x, rounding = keys(2 * ANCHOR + 3), KvRounding(num_bits=4, delta=True)
    found = rounding.keys(x, torch.arange(x.shape[2])[None], None)
    for head in range(2):
        stored = torch.zeros(8)
        for t in range(x.shape[2]):
            if t % ANCHOR == 0:
                stored = torch.zeros(8)
            stored = stored + torch.tensor(slow((x[0, head, t] - stored).tolist(), 4))
            assert torch.equal(found[0, head, t], stored)
    assert (found - x).square().mean() < (rounding(x) - x).square().mean() / 2
    assert torch.equal(rounding(x), KvRounding(num_bits=4)(x)), "values are not differences"


@pytest.mark.parametrize("cut", [1, ANCHOR - 1, ANCHOR, ANCHOR + 5])
def test_tokens_in_two_calls_are_tokens_in_one(cut: int) -> None:
    x, rounding = keys(2 * ANCHOR), KvRounding(num_bits=4, delta=True)
    places = torch.arange(3, 3 + x.shape[2])[None]  # texts of a batch begin at different places
    whole = rounding.keys(x, places, None)
    first = rounding.keys(x[:, :, :cut], places[:, :cut], None)
    second = rounding.keys(x[:, :, cut:], places[:, cut:], first[:, :, -1])
    assert torch.equal(torch.cat((first, second), dim=2), whole)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=32, max_size=32),
    num_bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([8, 32, None]),
)
def test_error_is_at_most_half_a_step_and_zeros_stay(
    values: list[float], num_bits: int, group_size: int | None
) -> None:
    x = torch.tensor([0.0, *values[1:]])
    found = KvRounding(num_bits=num_bits, group_size=group_size)(x)
    groups, size = x.view(-1, group_size or 32), group_size or 32
    step = (groups.amax(1).clamp(min=0) - groups.amin(1).clamp(max=0)) / (2**num_bits - 1)
    # BF16 moves the step by 2^-9 of itself, and the ends of the range by as much of the range; half a step is added
    bound = step * (0.51 + (2**num_bits) * 2**-8) + 1e-30
    assert bool(((found - x).view(-1, size).abs() <= bound[:, None] + 0.5 * step[:, None]).all())
    assert float(found[0]) == 0.0


def test_bytes() -> None:
    assert KvRounding(num_bits=8).bytes(64) == 64 + 3
    assert KvRounding(num_bits=4, group_size=32).bytes(64) == 32 + 2 * 2.5
    assert KvRounding(num_bits=4).bytes(512) == 256 + 4 * 2.5, "groups of 128"

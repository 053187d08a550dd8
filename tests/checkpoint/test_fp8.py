"""FP8 blocks: decoding against the formula element by element, encoding within half a step of E4M3."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_compress.checkpoint.formats.fp8 import (
    block_size,
    decode_fp8_block,
    encode_fp8_block,
    scale_shape,
    uses_power_of_two,
)
from deepseek_compress.errors import DscError

shapes = st.tuples(st.integers(1, 40), st.integers(1, 40))
blocks = st.tuples(st.integers(1, 17), st.integers(1, 17))


def brute_force(codes: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    out = torch.empty(codes.shape)
    for i in range(codes.shape[0]):
        for j in range(codes.shape[1]):
            out[i, j] = codes[i, j].float() * scale[i // block[0], j // block[1]].float()
    return out


@settings(max_examples=40, deadline=None)
@given(shape=shapes, block=blocks, seed=st.integers(0, 999), kind=st.sampled_from(["float32", "e8m0"]))
def test_decode_is_the_formula_also_at_ragged_edges(
    shape: tuple[int, int], block: tuple[int, int], seed: int, kind: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(shape, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(scale_shape(shape, block), generator=generator) + 0.1
    if kind == "e8m0":
        scale = scale.to(torch.float8_e8m0fnu)
    expected = brute_force(codes, scale, block)
    assert torch.equal(decode_fp8_block(codes, scale, block), expected)
    assert torch.equal(decode_fp8_block(codes, scale, block, torch.bfloat16), expected.bfloat16())


@settings(max_examples=40, deadline=None)
@given(shape=shapes, block=blocks, seed=st.integers(0, 999), power=st.booleans(), size=st.floats(1e-20, 1e20))
def test_encode_stays_within_half_a_step(
    shape: tuple[int, int], block: tuple[int, int], seed: int, power: bool, size: float
) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size
    codes, scale = encode_fp8_block(weight, block, power)
    assert scale.shape == scale_shape(shape, block)
    if power:
        assert bool((torch.frexp(scale).mantissa == 0.5).all())
    spread = scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]
    error = (decode_fp8_block(codes, scale, block) - weight).abs() / spread
    # Three mantissa bits: half a step is at most 1/16 of the value, or half the smallest subnormal, 2**-10.
    assert bool((error <= (weight.abs() / spread / 16).clamp(min=2**-10) * (1 + 1e-5)).all())


def test_what_was_decoded_encodes_to_the_same_values() -> None:
    weight = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))
    once = decode_fp8_block(*encode_fp8_block(weight))
    twice = decode_fp8_block(*encode_fp8_block(once))
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


def test_zero_blocks_have_scale_one() -> None:
    codes, scale = encode_fp8_block(torch.zeros(130, 5))
    assert torch.equal(scale, torch.ones(2, 1))
    assert torch.equal(decode_fp8_block(codes, scale), torch.zeros(130, 5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_no_number_is_named(bad: float) -> None:
    codes, scale = encode_fp8_block(torch.ones(4, 4))
    scale[0, 0] = bad
    with pytest.raises(DscError, match=r"layer\.weight: 1 of 1 scales"):
        decode_fp8_block(codes, scale, name="layer.weight")


def test_the_config_says_block_and_scale_form() -> None:
    assert block_size({}) == (128, 128)
    assert block_size({"quantization_config": {"weight_block_size": [64, 32]}}) == (64, 32)
    with pytest.raises(DscError, match="weight_block_size"):
        block_size({"quantization_config": {"weight_block_size": "128"}})
    assert uses_power_of_two({"quantization_config": {"scale_fmt": "ue8m0"}})
    assert not uses_power_of_two({"quantization_config": {"fmt": "e4m3"}})

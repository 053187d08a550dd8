"""pack-quantized: the published golden vectors, compressed-tensors' own packer, and a bit-by-bit reference."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_compress.checkpoint.formats.packed import (
    bits_of,
    int8_parts,
    pack_rows,
    pack_weight,
    shapes_of,
    unpack_rows,
    unpack_weight,
)
from deepseek_compress.errors import DscError
from deepseek_compress.numerics.types import Quantized

bits = st.integers(2, 8)


def by_bits(codes: torch.Tensor, num_bits: int) -> list[list[int]]:
    """Each row as one integer, code i shifted by i * num_bits; then cut into words of 32 bits."""
    rows = []
    for row in codes.tolist():
        stream = sum(code << i * num_bits for i, code in enumerate(row))
        words = [stream >> 32 * w & 0xFFFFFFFF for w in range(-(-len(row) * num_bits // 32))]
        rows.append([word - (1 << 32) if word >> 31 else word for word in words])
    return rows


def signed(*words: int) -> list[int]:
    return [word - (1 << 32) if word >> 31 else word for word in words]


def test_golden_row() -> None:
    codes = torch.arange(16, dtype=torch.uint8).view(1, 16)  # q = -8 .. 7
    assert pack_rows(codes, 4).tolist() == [signed(0x76543210, 0xFEDCBA98)]


def test_golden_zero_points() -> None:
    zero = torch.tensor([[2 * r + c for c in range(2)] for r in range(8)], dtype=torch.uint8)  # stored plus 8
    weight = Quantized(torch.zeros(8, 32, dtype=torch.uint8), torch.ones(8, 2), zero)
    assert pack_weight(weight)["weight_zero_point"].tolist() == [signed(0xECA86420, 0xFDB97531)]


@settings(max_examples=60, deadline=None)
@given(num_bits=st.integers(1, 8), rows=st.integers(1, 5), columns=st.integers(1, 150), seed=st.integers(0, 999))
def test_rows_are_dense_bitstreams(num_bits: int, rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**num_bits, (rows, columns), generator=generator, dtype=torch.uint8)
    words = pack_rows(codes, num_bits)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert words.tolist() == by_bits(codes, num_bits)
    assert torch.equal(unpack_rows(words, num_bits, columns), codes)
    theirs = (codes.int() - (1 << num_bits - 1)).to(torch.int8)
    assert torch.equal(words, pack_to_int32(theirs, num_bits))
    assert torch.equal(unpack_from_int32(words, num_bits, codes.shape), theirs)


@settings(max_examples=40, deadline=None)
@given(
    num_bits=bits, rows=st.integers(1, 40), groups=st.integers(1, 3), symmetric=st.booleans(), seed=st.integers(0, 999)
)
def test_a_weight_comes_back_and_theirs_is_the_same(
    num_bits: int, rows: int, groups: int, symmetric: bool, seed: int
) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = random_weight(num_bits, rows, groups * 32, groups, symmetric, seed)
    parts = pack_weight(weight)
    back = unpack_weight("w", parts)
    assert back.num_bits == num_bits
    assert back.symmetric == symmetric
    assert all(torch.equal(getattr(back, field), getattr(weight, field)) for field in ("codes", "scale", "zero_point"))
    args = QuantizationArgs(num_bits=num_bits, type="int", symmetric=symmetric, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    theirs = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    assert torch.equal(theirs, back.dequantize(torch.bfloat16))


def random_weight(
    num_bits: int, rows: int, columns: int, groups: int, symmetric: bool = False, seed: int = 0
) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**num_bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, groups, generator=generator).add(0.01).bfloat16().float()
    zero = torch.randint(0, 2**num_bits, (rows, groups), generator=generator, dtype=torch.uint8)
    if symmetric:
        zero = torch.full_like(zero, 1 << num_bits - 1)
    return Quantized(codes, scale, zero, num_bits, symmetric)


def test_int8_parts_are_what_compressed_tensors_reads() -> None:
    from compressed_tensors.compressors.naive_quantized.base import IntQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = random_weight(8, 6, 32, 1, symmetric=True)
    parts = int8_parts(weight)
    args = QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="channel")
    theirs = IntQuantizationCompressor.decompress(parts, QuantizationScheme(targets=["Linear"], weights=args))["weight"]
    assert torch.equal(theirs, weight.dequantize(torch.bfloat16))
    assert torch.equal(unpack_weight("w", parts).codes, weight.codes)


def test_scales_that_the_stored_type_does_not_hold_are_refused() -> None:
    weight = Quantized(torch.zeros(1, 32, dtype=torch.uint8), torch.tensor([[1.001]]), torch.zeros(1, 1).byte())
    with pytest.raises(ValueError, match="not exact"):
        pack_weight(weight)


@pytest.mark.parametrize("columns", [32, 64, 1536, 7168, 10944])
@pytest.mark.parametrize("num_bits", range(1, 9))
def test_bits_follow_from_the_shapes(num_bits: int, columns: int) -> None:
    assert bits_of("w", -(-columns * num_bits // 32), columns) == num_bits


def test_words_that_no_width_explains() -> None:
    with pytest.raises(DscError, match="9 words a row do not hold 32 columns"):
        bits_of("w", 9, 32)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_shapes_are_known_before_the_values(bits: int, symmetric: bool) -> None:
    zero = torch.full((13, 3), 1 << (bits - 1), dtype=torch.uint8)
    weight = Quantized(torch.zeros(13, 96, dtype=torch.uint8), torch.ones(13, 3), zero, bits, symmetric)
    made = {key: (part.dtype, tuple(part.shape)) for key, part in pack_weight(weight).items()}
    assert list(shapes_of((13, 96), bits, 32, symmetric).items()) == list(made.items())

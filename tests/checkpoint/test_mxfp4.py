"""MXFP4 against the format's own definition, bit by bit, and against compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_compress.checkpoint.formats.mxfp4 import GROUP, decode_mxfp4, encode_mxfp4
from deepseek_compress.errors import DscError


def e2m1(nibble: int) -> float:
    """OCP MX v1.0, table of E2M1: sign, two exponent bits of bias 1, one mantissa bit, subnormal at exponent 0."""
    sign, exponent, mantissa = nibble >> 3, nibble >> 1 & 3, nibble & 1
    size = mantissa * 0.5 if exponent == 0 else 2.0 ** (exponent - 1) * (1 + mantissa / 2)
    return -size if sign else size


def brute_force(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, half = codes.shape
    out = torch.empty(rows, half * 2)
    for i in range(rows):
        for j in range(half * 2):
            nibble = int(codes[i, j // 2]) >> 4 * (j % 2) & 15
            out[i, j] = e2m1(nibble) * 2.0 ** (int(scale[i, j // GROUP]) - 127)
    return out


def test_every_byte_decodes_by_the_table() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scale = torch.arange(119, 135, dtype=torch.uint8).view(16, 1)
    assert torch.equal(decode_mxfp4(codes, scale), brute_force(codes, scale))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), groups=st.integers(1, 3), seed=st.integers(0, 999))
def test_decode_and_encode_are_inverse_on_the_grid(rows: int, groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (rows, groups * 16), generator=generator, dtype=torch.uint8)
    scale = torch.randint(1, 250, (rows, groups), generator=generator, dtype=torch.uint8)
    values = decode_mxfp4(codes, scale)
    assert torch.equal(values, brute_force(codes, scale))
    assert torch.equal(decode_mxfp4(*encode_mxfp4(values)), values)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), size=st.floats(1e-30, 1e30))
def test_encode_takes_the_nearest_value_of_its_scale(seed: int, size: float) -> None:
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed)) * size
    codes, scale = encode_mxfp4(weight)
    steps = torch.exp2(scale.float() - 127).repeat_interleave(GROUP, 1)
    grid = torch.tensor([e2m1(n) for n in range(16)])
    best = (weight.unsqueeze(-1) / steps.unsqueeze(-1) - grid).abs().amin(-1)
    assert torch.equal((decode_mxfp4(codes, scale) / steps - weight / steps).abs(), best)


def test_compressed_tensors_reads_the_same_values() -> None:
    from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
    from compressed_tensors.quantization.quant_scheme import MXFP4A16, QuantizationScheme

    codes, scale = encode_mxfp4(torch.randn(8, 96, generator=torch.Generator().manual_seed(0)))
    scheme = QuantizationScheme(targets=["Linear"], **MXFP4A16)
    parts = {"weight_packed": codes, "weight_scale": scale}
    theirs = MXFP4PackedCompressor.decompress(parts, scheme)["weight"]
    assert torch.equal(theirs.float(), decode_mxfp4(codes, scale))


def test_a_scale_of_255_is_an_error_that_names_the_weight() -> None:
    codes = torch.zeros(1, 16, dtype=torch.uint8)
    with pytest.raises(DscError, match=r"expert\.weight: 1 of 1 scales are NaN"):
        decode_mxfp4(codes, torch.tensor([[255]], dtype=torch.uint8), name="expert.weight")

"""Every build of the pack kernel against the slow reference, bit for bit, and the reference against `numerics.rtn`."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import reference
from tests.cuda_ops.weight_cases import BLOCK, KINDS, stored, weights

# rows, columns, group: whole words, ragged rows, ragged blocks, one group a row, sizes no vector divides
SHAPES = [(64, 512, 128), (13, 352, 32), (130, 384, 64), (3, 2304, 2304), (9, 30, 10), (5, 20, 20), (1, 16, 16)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_equals_the_reference(isa: str, kind: str, symmetric: bool) -> None:
    for rows, columns, group in SHAPES:
        if kind == "mxfp4" and columns % 32:
            continue
        weight, scale = stored(kind, rows, columns)
        made = cuda_ops.pack_weights(weight, scale, group_size=group, symmetric=symmetric)
        packed, scales, zero, bad = reference.pack_weights(weight, scale, BLOCK, group, symmetric)
        assert bad == -1
        assert torch.equal(made.packed, packed), (rows, columns, group)
        assert torch.equal(made.scale.view(torch.int16), scales.view(torch.int16)), (rows, columns, group)
        assert made.zero_point is None if symmetric else torch.equal(made.zero_point, zero)


@pytest.mark.parametrize("symmetric", [False, True])
def test_reference_is_round_to_nearest(symmetric: bool) -> None:
    """The fused road and `decode, numerics.rtn, pack` are one rule."""
    from deepseek_compress.numerics.rtn import Rtn
    from deepseek_compress.numerics.types import Statistics

    for rows, columns, group in SHAPES:
        weight = weights(rows, columns)
        codes, scale, zero = reference.quantize(weight, group, symmetric)
        expected = Rtn(group_size=group, symmetric=symmetric)(weight, Statistics())
        assert torch.equal(codes, expected.codes)
        assert torch.equal(scale.float(), expected.scale)
        assert torch.equal(zero, expected.zero_point)


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_decode_is_that_of_the_reader(kind: str) -> None:
    from deepseek_compress.checkpoint.formats.fp8 import decode_fp8_block
    from deepseek_compress.checkpoint.formats.mxfp4 import decode_mxfp4

    weight, scale = stored(kind, 130, 384)
    assert scale is not None
    if kind == "fp8":
        expected = decode_fp8_block(weight, scale, BLOCK)
    else:
        expected = decode_mxfp4(weight.view(torch.uint8), scale.view(torch.uint8))
    assert torch.equal(reference.decode(weight, scale, BLOCK), expected)


def compressed_tensors_helpers() -> ModuleType:
    """Their packing functions alone: importing the package takes eight seconds."""
    found = importlib.util.find_spec("compressed_tensors")
    if found is None or not found.submodule_search_locations:
        pytest.skip("compressed-tensors is not installed")
    path = Path(found.submodule_search_locations[0]) / "compressors" / "pack_quantized" / "helpers.py"
    spec = importlib.util.spec_from_file_location("compressed_tensors_helpers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_layout_is_that_of_compressed_tensors() -> None:
    """The golden vectors of pack-quantized: codes along columns, zero points along rows, low nibble first."""
    assert [w & 0xFFFFFFFF for w in reference.pack_rows(torch.arange(16, dtype=torch.uint8)[None])[0].tolist()] == [
        0x76543210,
        0xFEDCBA98,
    ]
    helpers = compressed_tensors_helpers()
    weight = weights(13, 352)
    made = cuda_ops.pack_weights(weight, group_size=32)
    codes, _, zero = reference.quantize(weight, 32, False)
    assert torch.equal(made.packed, helpers.pack_to_int32((codes.int() - 8).to(torch.int8), 4))
    packed_zero = helpers.pack_to_int32((zero.int() - 8).to(torch.int8), 4, packed_dim=0)
    assert made.zero_point is not None
    assert torch.equal(made.zero_point, packed_zero)


def test_threads_do_not_change_a_bit(isa: str) -> None:
    weight = weights(300, 1024).bfloat16()
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(cuda_ops.pack_weights(weight, group_size=64))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_zeros_of_a_sparse_weight_stay_zero(isa: str) -> None:
    weight = weights(64, 256)
    weight[:, 1::2] = 0
    made = cuda_ops.pack_weights(weight, group_size=64)
    codes = torch.stack([made.packed >> 4 * i & 15 for i in range(8)], -1).view(64, 4, 64)
    assert made.zero_point is not None
    zero = torch.stack([made.zero_point >> 4 * i & 15 for i in range(8)], 1).view(64, 4, 1)
    assert ((codes == zero).view(64, 256)[:, 1::2]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(isa: str, value: float) -> None:
    weight = torch.ones(70, 512)
    weight[41, 300] = value
    weight[66, 2] = value
    with pytest.raises(cuda_ops.WeightError, match="q_proj: row 41 holds NaN"):
        cuda_ops.pack_weights(weight, group_size=128, name="q_proj")
    assert reference.pack_weights(weight, None, BLOCK, 128, False)[3] == 41


def test_every_bf16_number(isa: str) -> None:
    """Each once in a group of its own: equal to the reference, or refused."""
    numbers = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    weight = torch.zeros(len(numbers), 48, dtype=torch.bfloat16)
    weight[:, 37], weight[:, 9] = numbers, 0.5
    finite = numbers.float().isfinite()
    made = cuda_ops.pack_weights(weight[finite], group_size=48)
    packed, scales, zero, _ = reference.pack_weights(weight[finite], None, BLOCK, 48, False)
    assert torch.equal(made.packed, packed)
    assert torch.equal(made.scale.view(torch.int16), scales.view(torch.int16))
    assert made.zero_point is not None and torch.equal(made.zero_point, zero)
    for row in weight[~finite]:
        with pytest.raises(cuda_ops.WeightError, match="row 0"):
            cuda_ops.pack_weights(row[None], group_size=48)


def test_fp8_with_scales_at_the_ends_of_float32(isa: str) -> None:
    codes = torch.arange(128, dtype=torch.uint8).repeat(4, 2) % 9  # 0 to 2^-6
    codes[:, ::3] |= 0x80
    for scale in (2.0**121, 2.0**119, 1.9e-38, 1e-44):
        block = torch.full((1, 2), scale)
        made = cuda_ops.pack_weights(codes.view(torch.float8_e4m3fn), block, group_size=128)
        packed, scales, zero, bad = reference.pack_weights(codes.view(torch.float8_e4m3fn), block, BLOCK, 128, False)
        assert bad == -1
        assert torch.equal(made.packed, packed) and torch.equal(made.scale.float(), scales.float())
        assert made.zero_point is not None and torch.equal(made.zero_point, zero)


def test_a_nan_of_each_format_is_refused(isa: str) -> None:
    fp8, scale = stored("fp8", 64, 256)
    fp8.view(torch.uint8)[10, 17] = 0xFF
    with pytest.raises(cuda_ops.WeightError, match="row 10"):
        cuda_ops.pack_weights(fp8, scale, group_size=64)
    mxfp4, exponent = stored("mxfp4", 64, 256)
    assert exponent is not None
    exponent.view(torch.uint8)[20, 3] = 255
    with pytest.raises(cuda_ops.WeightError, match="row 20"):
        cuda_ops.pack_weights(mxfp4, exponent, group_size=64)


@pytest.mark.parametrize(
    ("weight", "scale", "group", "match"),
    [
        (torch.ones(4, 96), None, 64, "96 columns do not divide into groups of 64; set group_size: 32"),
        (torch.ones(4, 64, dtype=torch.int8), None, 32, "cannot pack torch.int8 with no scale"),
        (torch.ones(256, 128).to(torch.float8_e4m3fn), torch.ones(1, 1), 32, r"not \(2, 1\)"),
        (torch.ones(4, 64, dtype=torch.uint8), torch.ones(4, 2, dtype=torch.uint8), 32, r"not \(4, 4\)"),
    ],
)
def test_mistakes_are_named(weight: Tensor, scale: Tensor | None, group: int, match: str) -> None:
    with pytest.raises(cuda_ops.WeightError, match=match):
        cuda_ops.pack_weights(weight, scale, group_size=group, name="up_proj")

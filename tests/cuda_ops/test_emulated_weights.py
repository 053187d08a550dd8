"""The CUDA kernels that make 4-bit weights, unchanged, on the CPU: the bits of the CPU kernels and references."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import cuda_ops
from cuda_ops import build, harness, harness_weights, reference
from cuda_ops.harness_weights import GPTQ, PACK
from tests.cuda_ops.weight_cases import BLOCK, KINDS, SHRINK, batch, groups, stored, weights

ORDERS = [0, 1, 7]
# kernel -> rows, columns, group: whole words, ragged rows and ragged blocks, one group a row, sizes no vector divides
SHAPES = {
    "naive": [(9, 30, 10), (3, 96, 32), (17, 136, 17)],
    "warp": [(13, 352, 32), (9, 320, 64), (130, 256, 128), (8, 512, 256)],
    "block": [(11, 1408, 1408), (5, 96, 48), (1, 16, 16), (9, 256, 128)],
    "automatic": [(7, 20, 20), (9, 2560, 2560), (3, 32, 32), (1, 8, 8)],
}
SPECIAL = [0.0, -0.0, 1e-45, -3e-39, 1e-30, 0.5, -7.5, 6e4, -6e4, 3e37]


@pytest.fixture(scope="module", autouse=True)
def emulation() -> ctypes.CDLL:
    try:
        return harness.emulation()
    except build.BuildError as error:
        pytest.skip(f"the emulation cannot be built: {error}")


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({4: torch.int32, 2: torch.int16}.get(tensor.itemsize, tensor.dtype))


def published(kind: str, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """`stored`, as the kernels take it."""
    weight, scale = stored(kind, rows, columns)
    weight = weight.view(torch.uint8) if kind == "mxfp4" else weight
    return weight, scale.view(torch.uint8) if scale is not None and kind == "mxfp4" else scale


def check_pack(call: harness_weights.Call, weight: Tensor, scale: Tensor | None, group: int, symmetric: bool) -> None:
    """Every output has the bits of the CPU kernel, zero points and padding included."""
    cuda_ops.load()
    encoding = call.job.encoding
    expected = torch.ops.deepseek_compress.pack_weights(weight, scale, encoding, *BLOCK, group, symmetric)
    for made, wanted in zip(call.outputs, expected, strict=True):
        assert torch.equal(bits(made), bits(wanted)), (tuple(weight.shape), group, symmetric)


@pytest.mark.parametrize("kernel", PACK)
@pytest.mark.parametrize("kind", KINDS)
def test_packing_equals_the_cpu_kernel_and_the_reference(kind: str, kernel: str) -> None:
    orders = itertools.cycle(ORDERS)
    for (rows, columns, group), symmetric in itertools.product(SHAPES[kernel], (False, True)):
        if kind == "mxfp4" and columns % 32:
            continue
        weight, scale = published(kind, rows, columns)
        call = harness_weights.pack(weight, scale, group, symmetric)
        call.emulate(PACK[kernel], next(orders))
        check_pack(call, weight, scale, group, symmetric)
        packed, stored_scale, zero, bad = reference.pack_weights(weight, scale, BLOCK, group, symmetric)
        for made, wanted in zip(call.outputs, (packed, stored_scale, zero, torch.tensor([bad])), strict=True):
            assert torch.equal(bits(made), bits(wanted))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 20),
    group=st.sampled_from([8, 24, 30, 32, 64, 96, 128, 200]),
    count=st.integers(1, 5),
    symmetric=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    specials=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(SPECIAL)), max_size=30),
    share=st.sampled_from([1.0, 0.1, 0.0]),
    order=st.sampled_from(ORDERS),
)
def test_packing_of_anything_equals_the_cpu_kernel(
    rows: int,
    group: int,
    count: int,
    symmetric: bool,
    dtype: torch.dtype,
    specials: list[tuple[int, float]],
    share: float,
    order: int,
) -> None:
    weight = weights(rows, group * count) * share
    weight.view(-1)[[at % weight.numel() for at, _ in specials]] = torch.tensor([value for _, value in specials])
    weight = weight.clamp(-6e4, 6e4).to(dtype) if dtype == torch.float16 else weight.to(dtype)
    call = harness_weights.pack(weight, None, group, symmetric)
    call.emulate(PACK["automatic"], order)
    check_pack(call, weight, None, group, symmetric)


def test_every_fp8_and_fp4_code_and_exponent() -> None:
    """Each code of E4M3 under scales at the ends of float32, each of E2M1 under each E8M0 exponent."""
    codes = torch.arange(256, dtype=torch.uint8).view(2, 128)
    codes[codes & 0x7F == 0x7F] = 0x80
    for factor in (2.0**110, 1.0, 1.9e-38, 1e-44):
        weight, scale = codes.view(torch.float8_e4m3fn), torch.full((1, 1), factor)
        for kernel, group in itertools.product(("naive", "warp", "block"), (32, 128)):
            call = harness_weights.pack(weight, scale, group)
            call.emulate(PACK[kernel])
            check_pack(call, weight, scale, group, False)
    nibbles = (torch.arange(16, dtype=torch.uint8) | torch.arange(16, dtype=torch.uint8).flip(0) << 4).repeat(252, 1)
    exponents = torch.arange(252, dtype=torch.uint8)[:, None]
    for kernel in ("naive", "warp", "block"):
        call = harness_weights.pack(nibbles, exponents, 32)
        call.emulate(PACK[kernel])
        check_pack(call, nibbles, exponents, 32, False)


@pytest.mark.parametrize("kernel", ["naive", "warp", "block"])
def test_the_first_bad_row_is_named(kernel: str) -> None:
    """NaN, infinity and a range beyond float32, in any format and any group; the rows before them are as ever."""
    for value in (torch.nan, torch.inf, -torch.inf):
        weight = torch.ones(30, 256)
        weight[21, 130], weight[25, 1] = value, value
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            call = harness_weights.pack(weight.to(dtype), None, 128)
            call.emulate(PACK[kernel], 7)
            assert int(call.outputs[3]) == 21
    wide = torch.ones(11, 128)
    wide[9, 3], wide[9, 77] = 3e38, -3e38
    fp8, scale = published("fp8", 16, 256)
    fp8.view(torch.uint8)[10, 200] = 0xFF
    mxfp4, exponent = published("mxfp4", 16, 256)
    assert exponent is not None
    exponent[12, 3] = 255
    for made, own, row in ((wide, None, 9), (fp8, scale, 10), (mxfp4, exponent, 12)):
        call = harness_weights.pack(made, own, 128)
        call.emulate(PACK[kernel], 1)
        assert int(call.outputs[3]) == row


@pytest.mark.parametrize("kind", KINDS)
def test_each_stored_byte_is_read_once_and_each_packed_one_written_once(kind: str) -> None:
    """`block` reads twice, the second time from the cache; a word is 16 bytes in BF16, two of them in float32."""
    rows, columns = 24, 512
    load = {"float32": 16, "float16": 16, "bfloat16": 16, "fp8": 8, "mxfp4": 4}[kind]
    weight, scale = published(kind, rows, columns)
    for kernel, times in (("warp", 1), ("block", 2)):
        call = harness_weights.pack(weight, scale, 128)
        counts = call.emulate(PACK[kernel])
        assert counts[0] == times * weight.numel() * weight.itemsize
        assert counts[2] == counts[0] // load
        written = [counts[4 * (len(call.inputs) + i) + 1] for i in range(4)]
        assert written == [rows * columns // 2, rows * 4 * 2, rows // 8 * 4 * 4, 0]


def test_kernels_refuse_what_they_cannot_take() -> None:
    odd = harness_weights.pack(torch.ones(8, 60), None, 30)
    blocks = harness_weights.pack(torch.ones(8, 64).to(torch.float8_e4m3fn), torch.ones(2, 8), 32, block=(4, 8))
    unaligned = harness_weights.pack(torch.ones(8 * 64 + 1)[1:].view(8, 64), None, 32)
    for call, kernel in itertools.product((odd, blocks, unaligned), ("warp", "block")):
        with pytest.raises(ValueError, match="does not take this job"):
            call.emulate(PACK[kernel])
        call.emulate(PACK["automatic"])
    with pytest.raises(ValueError, match="does not take this job"):
        harness_weights.pack(torch.ones(8, 96), None, 48).emulate(PACK["warp"])
    with pytest.raises(ValueError, match="does not take this job"):
        harness_weights.search(torch.ones(1, 129, 2), None, SHRINK, 4, False).emulate(GPTQ["tile"])


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kernel", GPTQ)
def test_search_equals_the_cpu_kernel_and_the_reference(kernel: str, symmetric: bool) -> None:
    orders = itertools.cycle(ORDERS)
    shrink = SHRINK[::3].contiguous()
    for count, size, rows, num_bits in [(2, 32, 70, 4), (1, 128, 5, 3), (3, 5, 18, 8), (1, 30, 65, 2)]:
        made, importance = groups(count, size, rows)
        for share in (None, importance):
            call = harness_weights.search(made, share, shrink, num_bits, symmetric)
            call.emulate(GPTQ[kernel], next(orders))
            for expected in (cuda_ops.search_grid, reference.search_grid):
                scale, zero = expected(made, share, shrink, num_bits, symmetric)
                assert torch.equal(call.outputs[0], scale), (size, rows)
                assert torch.equal(call.outputs[1], zero), (size, rows)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 3),
    size=st.sampled_from([1, 7, 8, 16, 32, 64, 140]),
    rows=st.sampled_from([1, 2, 63, 65]),
    num_bits=st.integers(2, 8),
    symmetric=st.booleans(),
    weighted=st.booleans(),
    steps=st.integers(1, 3),
    specials=st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from(SPECIAL)), max_size=20),
    factor=st.sampled_from([1.0, 0.0, 1e-30, 1e-38, 1e15]),
)
def test_search_of_anything_equals_the_cpu_kernel(
    count: int,
    size: int,
    rows: int,
    num_bits: int,
    symmetric: bool,
    weighted: bool,
    steps: int,
    specials: list[tuple[int, float]],
    factor: float,
) -> None:
    made, importance = groups(count, size, rows)
    made = made * factor
    made.view(-1)[[at % made.numel() for at, _ in specials]] = torch.tensor([value for _, value in specials])
    share = importance if weighted else None
    scale, zero = cuda_ops.search_grid(made, share, SHRINK[:steps], num_bits, symmetric)
    for kernel in ("naive", "automatic"):
        call = harness_weights.search(made, share, SHRINK[:steps], num_bits, symmetric)
        call.emulate(GPTQ[kernel], 7)
        assert torch.equal(bits(call.outputs[0]), bits(scale))
        assert torch.equal(bits(call.outputs[1]), bits(zero))


def test_search_reads_each_weight_once() -> None:
    made, importance = groups(2, 64, 100)
    call = harness_weights.search(made, importance, SHRINK[:2], 4, False)
    counts = call.emulate(GPTQ["tile"])
    assert counts[0] == 4 * made.numel()
    assert [counts[4 * i + 1] for i in (3, 4)] == [4 * 2 * 100] * 2


def rounded(given_: dict[str, Tensor], fixed: Tensor | None, kernel: str, order: int) -> tuple[Tensor, Tensor]:
    """Codes and residual by one kernel on the emulation."""
    codes = torch.full(given_["base"].shape, 77, dtype=torch.uint8)
    residual = torch.full(codes.shape, torch.nan)
    grid = (given_["scale"], given_["zero_point"], 15)
    harness_weights.rounding(
        given_["base"], given_["target"], given_["feedback"], grid, given_["group"], fixed, codes, residual
    ).emulate(GPTQ[kernel], order)
    return codes, residual


def check_rounding(given_: dict[str, Tensor], fixed: Tensor | None, kernel: str, order: int) -> None:
    """Both loops by one kernel have the bits of the CPU kernels."""
    codes, residual = rounded(given_, fixed, kernel, order)
    expected = torch.empty_like(codes), torch.empty_like(residual)
    grid = (given_["scale"], given_["zero_point"], 15)
    base, target, feedback = given_["base"], given_["target"], given_["feedback"]
    cuda_ops.round_columns(base, target, feedback, grid, given_["group"], fixed, *expected)
    assert torch.equal(codes, expected[0]), tuple(base.shape)
    assert torch.equal(bits(residual), bits(expected[1])), tuple(base.shape)
    calm = feedback / base.shape[1] ** 0.5
    call = harness_weights.unrounded(base, target, calm)
    call.emulate(GPTQ[kernel], order)
    assert torch.equal(bits(call.outputs[0]), bits(cuda_ops.unrounded(base, target, calm))), tuple(base.shape)


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("kernel", GPTQ)
def test_rounding_equals_the_cpu_kernel(kernel: str, sparse: bool) -> None:
    """One and several matrices; whole tiles and ragged ones; more columns than shared memory holds."""
    orders = itertools.cycle(ORDERS)
    for matrices, columns, rows, count in [
        (1, 128, 65, 1),
        (3, 37, 20, 3),
        (2, 16, 64, 1),
        (1, 150, 3, 2),
        (2, 1, 5, 1),
    ]:
        made = batch(matrices, columns, rows, count)
        check_rounding(made, made["fixed"] if sparse else None, kernel, next(orders))


@settings(max_examples=30, deadline=None)
@given(
    matrices=st.integers(1, 3),
    columns=st.integers(1, 70),
    rows=st.sampled_from([1, 2, 33, 66]),
    count=st.integers(1, 3),
    sparse=st.booleans(),
    zero=st.booleans(),
    factor=st.sampled_from([1.0, 1e-38, 1e6]),
    order=st.sampled_from(ORDERS),
)
def test_rounding_of_anything_equals_the_cpu_kernel(
    matrices: int, columns: int, rows: int, count: int, sparse: bool, zero: bool, factor: float, order: int
) -> None:
    made = batch(matrices, columns, rows, count)
    made["base"], made["target"] = made["base"] * factor, made["target"] * factor
    if zero:
        made["target"][:, ::2] = -0.0
        made["base"][:, ::3] = 0
    check_rounding(made, made["fixed"] if sparse else None, "automatic", order)


def test_rounding_of_blocks_of_a_larger_batch() -> None:
    """Columns 20 to 39 of each matrix, as the solver passes them: what lies around them is neither read nor written."""
    made = batch(3, 60, 70, 2)
    own = slice(20, 40)
    inner = {name: part[:, own] for name, part in made.items() if name in ("base", "target", "group", "fixed")}
    feedback = made["feedback"][:, own, own].contiguous()
    codes, residual = torch.full((3, 60, 70), 77, dtype=torch.uint8), torch.full((3, 60, 70), torch.nan)
    grid, expected = (made["scale"], made["zero_point"], 15), (codes.clone(), residual.clone())
    parts = (inner["base"], inner["target"], feedback, grid, inner["group"], inner["fixed"])
    harness_weights.rounding(*parts, codes[:, own], residual[:, own]).emulate(GPTQ["automatic"], 7)
    cuda_ops.round_columns(*parts, expected[0][:, own], expected[1][:, own])
    assert torch.equal(codes, expected[0])
    assert torch.equal(bits(residual), bits(expected[1]))


def test_rounding_keeps_what_columns_missed_on_chip() -> None:
    """Up to 128 columns each weight is read once and nothing written is read back; beyond, the residual is."""
    for columns, read_back in ((128, 0), (144, 4 * 64 * sum(range(16, 144, 16)))):
        made = batch(1, columns, 64, 1)
        codes, residual = torch.empty(1, columns, 64, dtype=torch.uint8), torch.empty(1, columns, 64)
        call = harness_weights.rounding(
            made["base"], made["target"], made["feedback"], (made["scale"], made["zero_point"], 15), made["group"],
            None, codes, residual,
        )  # fmt: skip
        counts = call.emulate(GPTQ["automatic"])
        assert [counts[0], counts[4]] == [4 * columns * 64] * 2
        assert counts[4 * len(call.inputs) + 4] == read_back


@pytest.mark.parametrize("kernel", ["naive", "tile"])
def test_the_order_of_threads_does_not_change_a_bit(kernel: str) -> None:
    made = batch(2, 40, 90, 2)
    results = [rounded(made, made["fixed"], kernel, order) for order in (*ORDERS, 8, 9)]
    assert all(torch.equal(results[0][i], other[i]) for other in results[1:] for i in range(2))


def test_the_emulation_sees_an_access_outside_every_tensor() -> None:
    call = harness_weights.pack(torch.ones(8, 64), None, 32)
    call.job.rows = 9
    with pytest.raises(RuntimeError, match="a load of 16 bytes outside every tensor"):
        call.emulate(PACK["warp"])
    search = harness_weights.search(torch.ones(1, 8, 4), None, SHRINK, 4, False)
    search.job.size = 16
    with pytest.raises(RuntimeError, match="a load of 4 bytes outside every tensor"):
        search.emulate(GPTQ["tile"])

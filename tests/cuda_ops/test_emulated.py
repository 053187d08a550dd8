"""The CUDA kernels, unchanged, on the CPU: one fiber a thread, several orders, memory traffic counted and checked."""

from __future__ import annotations

import ctypes
import itertools

import pytest
import torch

from cuda_ops import build, harness
from tests.cuda_ops import cases

ORDERS = [0, 1, 7]
# kernel, columns: whole vectors, ragged rows, one column, the longest each takes
ROWS = {
    "naive": [1, 40],
    "warp": [1, 24, 101, 256],
    "block": [7, 1024, 1001, 4096],
    "online": [40, 1001, 5000],
}


@pytest.fixture(scope="module", autouse=True)
def emulation() -> ctypes.CDLL:
    try:
        return harness.emulation()
    except build.BuildError as error:
        pytest.skip(f"the emulation cannot be built: {error}")


@pytest.mark.parametrize("kernel", ROWS)
@pytest.mark.parametrize("dtype", cases.IN)
def test_equals_double_precision(kernel: str, dtype: torch.dtype) -> None:
    """Every kernel, input, output and mask on the second row length, one of each output on the others."""
    orders = itertools.cycle(ORDERS)
    for columns in ROWS[kernel]:
        shape = (2, 2, columns)
        x, (row, column) = cases.logits(dtype, *shape), cases.scales(dtype, *shape)
        every = list(itertools.product(cases.OUT, cases.MASKS))
        for out_dtype, kind in every if columns == ROWS[kernel][1] else every[::5]:
            visible = cases.mask(kind, *shape)
            call = harness.prepare(x, row, column, visible, out_dtype)
            harness.emulate(call, kernel, next(orders))
            cases.check(call, row, column, visible)


@pytest.mark.parametrize("kernel", ["warp", "block", "online"])
def test_the_order_of_threads_does_not_change_a_bit(kernel: str) -> None:
    x = cases.logits(torch.float16, 5, 200)
    results = []
    for order in (*ORDERS, 8, 9):
        call = harness.prepare(x, None, None, None, torch.float32)
        harness.emulate(call, kernel, order)
        results.append(call.out)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
@pytest.mark.parametrize(
    ("columns", "reads"),
    [(128, 1), (256, 1), (1024, 1), (1025, 1), (8192, 1), (32767, 1), (32768, 1), (32776, 2), (33001, 2)],
)
def test_each_byte_is_read_once_and_written_once(columns: int, reads: int, dtype: torch.dtype) -> None:
    """The kernel the operator chooses: one reading up to 32,768 columns, two beyond; loads of 16 bytes."""
    x = cases.logits(dtype, 1, columns)
    row, column = cases.scales(dtype, 1, columns)
    call = harness.prepare(x, row, column, None, torch.float16)
    traffic = harness.emulate(call, "automatic")
    size = x.numel() * x.element_size()
    assert traffic.read_bytes == reads * size
    assert traffic.written_bytes == 2 * columns
    if columns % (16 // x.element_size()) == 0:
        assert traffic.wide_loads == traffic.loads == reads * size // 16


def test_columns_outside_the_range_are_not_read() -> None:
    """A causal mask given as ranges saves the bytes it hides, up to whole vectors of 8."""
    ranges = torch.stack((torch.zeros(64), torch.arange(64) + 1), -1).int()
    call = harness.prepare(cases.logits(torch.float16, 64, 64), None, None, ranges, torch.float16)
    assert harness.emulate(call, "automatic").read_bytes == sum(2 * 8 * -(-(row + 1) // 8) for row in range(64))


def test_rows_too_long_for_a_kernel_are_refused() -> None:
    for kernel, longest in (("warp", 256), ("block", 32768)):
        call = harness.prepare(torch.zeros(1, longest + 1), None, None, None, torch.float16)
        with pytest.raises(ValueError, match="does not take"):
            harness.emulate(call, kernel)


def test_nan_makes_its_row_nan() -> None:
    for kernel in ROWS:
        x = cases.logits(torch.float32, 2, 200)
        x[1, 90] = torch.nan
        call = harness.prepare(x, None, None, None, torch.float32)
        harness.emulate(call, kernel)
        assert call.out[0].isfinite().all()
        assert call.out[1].isnan().all()


def test_the_largest_floats_do_not_overflow() -> None:
    big = torch.finfo(torch.float32).max
    x = torch.tensor([[big, big, -big, 0.0], [-big, -big, -big, -big]])
    for kernel in ROWS:
        call = harness.prepare(x, None, None, None, torch.float32)
        harness.emulate(call, kernel)
        assert torch.allclose(call.out, torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4]), atol=1e-6)


def test_the_emulation_sees_an_access_outside_every_tensor() -> None:
    call = harness.prepare(cases.logits(torch.float16, 2, 64), None, None, None, torch.float16)
    call.job.rows = 3
    with pytest.raises(RuntimeError, match="a load of 16 bytes outside every tensor"):
        harness.emulate(call, "block")


@pytest.mark.parametrize("order", ORDERS)
def test_the_emulation_sees_a_missing_barrier(order: int) -> None:
    """Shared memory starts as NaN: what is read before it is written shows in every order of threads."""
    out = torch.zeros(64)
    assert harness.emulation().dsc_faulty_emulated(0, order, ctypes.c_void_p(out.data_ptr())) == 0
    assert not torch.equal(out, torch.arange(63.0, -1, -1))


def test_the_emulation_sees_a_wait_that_never_ends() -> None:
    out = torch.zeros(64)
    assert harness.emulation().dsc_faulty_emulated(1, 0, ctypes.c_void_p(out.data_ptr())) == -1
    assert harness.emulation().dsc_emulated_error().startswith(b"deadlock: 63 of 64 threads wait for the block")

"""The CUDA kernels and the operator on a GPU, compiled here for it. Needs torch with CUDA, nvcc and nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch

import cuda_ops
from cuda_ops import build, harness, ops, reference
from tests.cuda_ops import cases

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(build.cuda_compiler() is None, reason="nvcc is not installed"),
]

# kernel, columns: whole vectors, ragged rows, one column, the longest each takes
ROWS = {
    "naive": [1, 40, 1000],
    "warp": [1, 24, 101, 128, 256],
    "block": [7, 257, 1000, 1001, 1024, 4096, 20000, 32767, 32768],
    "online": [40, 1001, 32768, 33001, 131072],
}


def to_gpu(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if t is None else t.cuda() for t in tensors]


@pytest.mark.parametrize("kernel", ROWS)
@pytest.mark.parametrize("dtype", cases.IN)
def test_kernel_equals_double_precision(kernel: str, dtype: torch.dtype) -> None:
    for columns in ROWS[kernel]:
        shape = (2, 5, columns)
        x, (row, column) = cases.logits(dtype, *shape), cases.scales(dtype, *shape)
        for out_dtype, kind in itertools.product(cases.OUT, cases.MASKS):
            visible = cases.mask(kind, *shape)
            on_gpu = to_gpu(x, row, column, visible)
            assert on_gpu[0] is not None
            call = harness.prepare(on_gpu[0], *on_gpu[1:], out_dtype)
            harness.run_on_gpu(call, kernel)
            torch.cuda.synchronize()
            cases.check(call, row, column, visible)


def test_operator_runs_the_native_kernel() -> None:
    assert ops.load_cuda(torch.cuda.get_device_capability()), "the CUDA operator could not be built; see the log"
    shape = (2, 3, 65, 1000)
    x, (row, column) = cases.logits(torch.int32, *shape), cases.scales(torch.int32, *shape)
    padding = torch.rand(2, 1, 1, 1000, generator=torch.Generator().manual_seed(1)) > 0.3
    for visible, out_dtype in itertools.product((None, padding), cases.OUT):
        out, scale = cuda_ops.softmax(*to_gpu(x, row, column, visible), out_dtype)  # type: ignore[arg-type]
        cpu = cuda_ops.softmax(x, row, column, visible, out_dtype)
        assert (out.is_cuda, out.dtype, scale.shape) == (True, out_dtype, cpu[1].shape)
        exact = reference.softmax(x, row, column, visible, torch.float64)[0]
        if out_dtype == torch.uint8:
            assert ((out.cpu() * scale.cpu().double() - exact).abs() <= 0.503 * scale.cpu()).all()
        elif out_dtype == torch.float32:
            assert torch.allclose(out.cpu().double(), exact, rtol=2e-5, atol=1e-30)
        else:
            nearest = exact.to(out_dtype).view(torch.int16).int()
            assert (out.cpu().view(torch.int16).int() - nearest).abs().max() <= 1


def test_operator_uses_the_current_stream() -> None:
    """Work queued on another stream before the call is seen by it."""
    x = torch.zeros(4096, 4096, device="cuda", dtype=torch.float16)
    cuda_ops.softmax(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(20):
            x = x + 0.25
        x[:, 0] += 30
        out = cuda_ops.softmax(x)[0]
    stream.synchronize()
    assert (out[:, 0] > 0.99).all()


def test_operator_in_a_cuda_graph() -> None:
    """The launch does not synchronise, so a graph can capture it."""
    x = cases.logits(torch.float16, 64, 1024).cuda()
    expected = cuda_ops.softmax(x)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = cuda_ops.softmax(x)[0]
    out.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, expected)


def test_logits_that_do_not_start_on_16_bytes() -> None:
    whole = cases.logits(torch.float16, 1, 8 * 64 + 8).cuda().view(-1)
    x = whole[1 : 1 + 8 * 64].view(8, 64)
    out = cuda_ops.softmax(x)[0]
    exact = reference.softmax(x.cpu(), None, None, None, torch.float16)[0]
    assert (out.cpu().view(torch.int16).int() - exact.view(torch.int16).int()).abs().max() <= 1

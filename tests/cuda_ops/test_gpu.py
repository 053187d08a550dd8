"""The CUDA kernels and the operator on a GPU, compiled here for it. Needs torch with CUDA, nvcc and nothing else."""

from __future__ import annotations

import itertools

import pytest
import torch

import cuda_ops
from cuda_ops import build, harness, harness_weights, ops, reference
from tests.cuda_ops import cases
from tests.cuda_ops.weight_cases import BLOCK, KINDS, SHRINK, batch, groups, stored

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


def same_bits(made: torch.Tensor, wanted: torch.Tensor) -> bool:
    whole = {4: torch.int32, 2: torch.int16}.get(made.itemsize, made.dtype)
    return torch.equal(made.cpu().view(whole), wanted.view(whole))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_packing_has_the_bits_of_the_cpu(kind: str, symmetric: bool) -> None:
    """Every kernel that takes the shape, and the operator."""
    shapes = [
        (64, 512, 128),
        (13, 352, 32),
        (130, 384, 64),
        (9, 512, 256),
        (3, 2304, 2304),
        (999, 7168, 128),
        (9, 30, 10),
    ]
    for rows, columns, group in shapes:
        if kind == "mxfp4" and columns % 32:
            continue
        weight, scale = stored(kind, rows, columns)
        weight = weight.view(torch.uint8) if kind == "mxfp4" else weight
        scale = scale.view(torch.uint8) if scale is not None and kind == "mxfp4" else scale
        here = (weight.cuda(), None if scale is None else scale.cuda())
        encoding = harness_weights.pack(weight, scale, group).job.encoding
        expected = torch.ops.deepseek_compress.pack_weights(weight, scale, encoding, *BLOCK, group, symmetric)
        for kernel, number in harness_weights.PACK.items():
            call = harness_weights.pack(*here, group, symmetric)
            try:
                call.launch(number)
            except ValueError:
                continue
            assert all(map(same_bits, call.outputs, expected)), (kernel, rows, columns, group)
        made = cuda_ops.pack_weights(*here, group_size=group, symmetric=symmetric)
        assert same_bits(made.packed, expected[0]) and same_bits(made.scale, expected[1])
    weight = torch.ones(70, 256, device="cuda")
    weight[41, 3] = torch.nan
    with pytest.raises(cuda_ops.WeightError, match="row 41 holds NaN"):
        cuda_ops.pack_weights(weight, group_size=64)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_search_has_the_bits_of_the_cpu(bits: int, symmetric: bool) -> None:
    for shape in [(2, 128, 128), (3, 64, 77), (5, 5, 18), (1, 200, 65), (300, 32, 70)]:
        made, importance = groups(*shape)
        for share in (None, importance):
            expected = cuda_ops.search_grid(made, share, SHRINK, bits, symmetric)
            here = (made.cuda(), None if share is None else share.cuda(), SHRINK.cuda(), bits, symmetric)
            assert all(map(same_bits, cuda_ops.search_grid(*here), expected)), shape
            call = harness_weights.search(*here)
            call.launch(harness_weights.GPTQ["naive"])
            assert all(map(same_bits, call.outputs, expected)), shape


@pytest.mark.parametrize("sparse", [False, True])
def test_rounding_has_the_bits_of_the_cpu(sparse: bool) -> None:
    for matrices, columns, rows, count in [(1, 128, 2048, 1), (5, 37, 200, 3), (2, 300, 65, 2), (64, 128, 256, 4)]:
        made = batch(matrices, columns, rows, count)
        here = {name: part.cuda() for name, part in made.items()}
        results = []
        for at in (made, here):
            codes = torch.full(at["base"].shape, 77, dtype=torch.uint8, device=at["base"].device)
            residual = torch.full(codes.shape, torch.nan, device=codes.device)
            grid = (at["scale"], at["zero_point"], 15)
            cuda_ops.round_columns(
                at["base"], at["target"], at["feedback"], grid, at["group"], at["fixed"] if sparse else None,
                codes, residual,
            )  # fmt: skip
            values = cuda_ops.unrounded(at["base"], at["target"], at["feedback"] / columns**0.5)
            results.append((codes.cpu(), residual.cpu(), values.cpu()))
        assert all(map(same_bits, results[1], results[0])), (matrices, columns, rows)


def test_solver_operators_in_a_cuda_graph() -> None:
    """None of them waits for the GPU."""
    made = {name: part.cuda() for name, part in batch(2, 64, 96, 2).items()}
    codes = torch.zeros(made["base"].shape, dtype=torch.uint8, device="cuda")
    residual, shrink = torch.zeros_like(made["base"]), SHRINK.cuda()
    grid = (made["scale"], made["zero_point"], 15)

    def work() -> tuple[torch.Tensor, ...]:
        cuda_ops.round_columns(
            made["base"], made["target"], made["feedback"], grid, made["group"], None, codes, residual
        )
        packed = torch.ops.deepseek_compress.pack_weights(made["target"][0], None, 0, 128, 128, 32, False)
        return *cuda_ops.search_grid(made["base"], None, shrink, 4, False), codes, residual, *packed

    expected = [part.clone() for part in work()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    codes.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))

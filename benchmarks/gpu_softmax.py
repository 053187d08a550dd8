"""How close does our CUDA softmax come to the memory's speed, and how does it compare with torch's?

    python -m benchmarks.gpu_softmax [--bytes N] [--repeats N]

Checked against double precision first. The floor is a device-to-device copy of the same number of bytes, measured in
the same run; logits are far larger than the second-level cache. Every line is the median of CUDA-event timings, both
sides in turns. `torch` is torch.softmax in the input's type for 16-bit and float32 logits, and the same int32 -> uint8
path composed from torch operators for the 8-bit one. Needs torch, nvcc and a GPU; without a GPU it says "not measured".
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cuda_ops
from cuda_ops import harness, ops, reference

COLUMNS = (128, 256, 1024, 4096, 32768, 131072)
PATHS = (
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.float32),
    (torch.int32, torch.uint8),
)


def ready(benchmark: str) -> str | None:
    """The name of the GPU with its operators loaded; None, and a line that says so, where there is no GPU."""
    if not torch.cuda.is_available():
        print(f"{benchmark}: not measured, no CUDA device")
        print(json.dumps({"benchmark": benchmark, "measured": False}))
        return None
    if not ops.load() or not ops.load_cuda(torch.cuda.get_device_capability()):
        raise SystemExit("error: the operators could not be built; see the message above")
    return torch.cuda.get_device_name()


def spiky(dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """Logits of standard deviation 4 with a few far above the rest."""
    x = torch.randn(rows, columns, device="cuda") * 4
    x[:, columns // 3] += 12
    return (x * 1000).to(torch.int32) if dtype == torch.int32 else x.to(dtype)


def composed(x: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """The int32 -> uint8 path from torch operators, in place wherever that is possible."""
    p = torch.softmax(x.float().mul_(row[:, None]).mul_(column), -1)
    scale = p.amax(-1, keepdim=True).div_(255)
    return p.div_(scale).round_().to(torch.uint8), scale


def median_ms(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Median milliseconds of each, in turns, after two calls to warm up."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(repeats + 2):
        for i, function in enumerate(functions):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            function()
            end.record()
            end.synchronize()
            if turn >= 2:
                times[i].append(start.elapsed_time(end))
    return [statistics.median(t) for t in times]


def check(out: Tensor, scale: Tensor, exact: Tensor) -> None:
    """Stop where the result is not what double precision gives."""
    if out.dtype == torch.uint8:
        good = ((out * scale.double() - exact).abs() <= 0.503 * scale).all()
    elif out.dtype == torch.float32:
        good = ((out - exact).abs() <= 2e-5 * exact + 1e-30).all()
    else:
        good = (out.view(torch.int16).int() - exact.to(out.dtype).view(torch.int16).int()).abs().max() <= 1
    if not good:
        raise SystemExit(f"wrong result: {out.dtype}, {out.shape[-1]} columns")


def measure(source: torch.dtype, target: torch.dtype, columns: int, size: int, repeats: int) -> dict[str, Any]:
    """One line of the table."""
    rows = max(1, size // (columns * source.itemsize))
    x = spiky(source, rows, columns)
    scales: tuple[Tensor, ...] = ()
    if source == torch.int32:
        scales = torch.full((rows,), 1e-3, device="cuda"), torch.linspace(0.9, 1.1, columns, device="cuda")
    out, scale = cuda_ops.softmax(x, *scales, out_dtype=target)
    part = tuple(s[:4] if s.numel() == rows else s for s in scales)
    exact = reference.softmax(x[:4], *(part or (None, None)), None, torch.float64)[0]
    check(out[:4], scale[:4], exact)
    moved = x.numel() * (source.itemsize + target.itemsize)
    half = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    other = torch.empty_like(half)
    theirs = (lambda: composed(x, *scales)) if scales else (lambda: torch.softmax(x, -1))
    times = median_ms(
        repeats, lambda: cuda_ops.softmax(x, *scales, out_dtype=target), theirs, lambda: other.copy_(half)
    )
    ours, torch_ms, floor = times
    return {
        "in": str(source).removeprefix("torch."),
        "out": str(target).removeprefix("torch."),
        "columns": columns,
        "rows": rows,
        "ours_ms": round(ours, 4),
        "torch_ms": round(torch_ms, 4),
        "copy_ms": round(floor, 4),
        "gb_per_s": round(moved / ours / 1e6),
        "of_copy": round(floor / ours, 3),
        "times_torch": round(torch_ms / ours, 2),
    }


def ladder(repeats: int) -> list[dict[str, Any]]:
    """Every kernel on the same FP16 rows: what each step of the ladder is worth."""
    lines = []
    for columns in (256, 4096):
        x = spiky(torch.float16, (64 << 20) // columns, columns)
        for kernel in harness.KERNELS:
            call = harness.prepare(x, None, None, None, torch.float16)
            try:
                harness.run_on_gpu(call, kernel)
            except ValueError:
                continue
            (ms,) = median_ms(repeats, lambda call=call, kernel=kernel: harness.run_on_gpu(call, kernel))
            lines.append(
                {"kernel": kernel, "columns": columns, "ms": round(ms, 4), "gb_per_s": round(x.numel() * 4 / ms / 1e6)}
            )
    return lines


def main() -> None:
    """Measure every path and row length, then the ladder; tables for people and one JSON line last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bytes", type=int, default=512 << 20, help="bytes of logits in each measurement")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if (name := ready("gpu_softmax")) is None:
        return
    print(f"{name}; torch {torch.__version__}; {options.bytes >> 20} MiB of logits")
    lines = []
    for source, target in PATHS:
        for columns in COLUMNS:
            line = measure(source, target, columns, options.bytes, options.repeats)
            lines.append(line)
            print("  ".join(f"{key} {value}" for key, value in line.items()), flush=True)
    steps = ladder(options.repeats)
    for step in steps:
        print("  ".join(f"{key} {value}" for key, value in step.items()))
    print(json.dumps({"benchmark": "gpu_softmax", "device": name, "lines": lines, "ladder": steps}))


if __name__ == "__main__":
    main()

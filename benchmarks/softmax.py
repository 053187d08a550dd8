"""How much faster is our softmax than torch's on this CPU? FP16 and BF16 in, FP16 out; int32 products to uint8.

Checked against the double-precision reference first; both sides measured in one run, one thread, CPU
time, best of several.

    python -m benchmarks.softmax [--elements N] [--repeats N]

The bars: 2 times torch.softmax, 4 times the 8-bit path composed from torch operators.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import cuda_ops
from benchmarks.common import present
from cuda_ops import reference

LENGTHS = (128, 1024, 4096, 32768)  # of rows
COLUMNS = ("in", "out", "columns", "rows", "ours, ns an element", "torch, ns", "ratio", "bar", "error (ulp, steps)")
BAR = {"float16": 2.0, "bfloat16": 2.0, "int32": 4.0}


def spiky(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Logits of standard deviation 6 with a few far above the rest, so that a wrong maximum or sum shows."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(rows, columns, generator=generator) * 6
    x[:, :: max(1, columns // 5)] += 15
    return (x * 1000).to(torch.int32) if dtype == torch.int32 else x.to(dtype)


def composed(x: Tensor, row_scale: Tensor, column_scale: Tensor) -> tuple[Tensor, Tensor]:
    """The int32 -> uint8 path from torch operators, in place wherever that is possible."""
    p = torch.softmax(x.float().mul_(row_scale[:, None]).mul_(column_scale), -1)
    scale = p.amax(-1, keepdim=True).div_(255)
    return p.div_(scale).round_().to(torch.uint8), scale


def best_of(repeats: int, *functions: Callable[[], object]) -> list[float]:
    """Least CPU seconds of each, taken in turns so that a busy moment of the machine hits all of them."""
    least = [float("inf")] * len(functions)
    for _ in range(repeats):
        for i, function in enumerate(functions):
            start = time.process_time()
            function()
            least[i] = min(least[i], time.process_time() - start)
    return least


def measure(dtype: torch.dtype, columns: int, elements: int, repeats: int) -> list[Any]:
    """One line of the table: time of both sides, and the largest error of ours."""
    rows = max(1, elements // columns)
    x = spiky(rows, columns, dtype)
    if dtype == torch.int32:
        scales = torch.full((rows,), 1e-3), torch.linspace(0.9, 1.1, columns)
        codes, scale = cuda_ops.softmax(x, *scales, out_dtype=torch.uint8)
        exact = reference.softmax(x[:8], *(scales[0][:8], scales[1]), None, torch.float64)[0]
        error = float(((codes[:8].double() * scale[:8] - exact).abs() / scale[:8]).max())  # in steps; best is 0.5
        if error > 0.502:
            raise SystemExit(f"wrong: int32 x {columns}: {error} steps")
        seconds = best_of(
            repeats,
            lambda: cuda_ops.softmax(x, *scales, out_dtype=torch.uint8),
            lambda: composed(x, *scales),
        )
    else:
        ours = cuda_ops.softmax(x, out_dtype=torch.float16)[0]
        exact = reference.softmax(x[:64], None, None, None, torch.float16)[0]
        error = int((ours[:64].view(torch.int16).int() - exact.view(torch.int16).int()).abs().max())  # in ulp
        if error > 1:
            raise SystemExit(f"wrong: {dtype} x {columns}: {error} ulp")
        seconds = best_of(repeats, lambda: cuda_ops.softmax(x, out_dtype=torch.float16), lambda: torch.softmax(x, -1))
    kind = str(dtype).removeprefix("torch.")
    ratio = seconds[1] / seconds[0]
    out = "uint8" if dtype == torch.int32 else "float16"
    return [kind, out, columns, rows, *(1e9 * s / x.numel() for s in seconds), ratio, BAR[kind], error]


def main() -> None:
    """Measure every dtype and row length."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--elements", type=int, default=1 << 20)
    parser.add_argument("--repeats", type=int, default=41)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = round(os.getloadavg()[0], 2)
    kinds = (torch.float16, torch.bfloat16, torch.int32)
    lines = [measure(kind, length, options.elements, options.repeats) for kind in kinds for length in LENGTHS]
    facts = {
        "instructions": cuda_ops.instructions(),
        "torch": torch.__version__,
        "threads": 1,
        "best_of": options.repeats,
        "load": load,
        "passed": all(line[COLUMNS.index("ratio")] >= line[COLUMNS.index("bar")] for line in lines),
    }
    present("softmax", COLUMNS, lines, facts)


if __name__ == "__main__":
    main()

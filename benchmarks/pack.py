"""How fast are stored weights decoded, rounded to 4 bits and packed, against the slow road and against the memory?

    python -m benchmarks.pack [--rows N] [--columns N] [--repeats N]

Equality with the reference is checked first, bit for bit. One thread, CPU seconds, best of several; the floor is the
time to read the stored bytes and write the packed ones at the speed of a copy measured in the same run. The bar: 250
million parameters a CPU second, 15 times what llm-compressor's model_free_ptq takes for the whole job.
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
from cuda_ops import ops, reference

GROUP = 128
BAR = 250e6
COLUMNS = ("stored", "instructions", "M parameters / CPU s", "of the floor", "times the reference", "times the bar")


def stored(kind: str, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """Random weights of standard deviation 0.02 as they are published."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator) * 0.02
    if kind == "bfloat16":
        return w.bfloat16(), None
    if kind == "fp8":
        shape = (-(-rows // 128), -(-columns // 128))
        return (w * 4000).to(torch.float8_e4m3fn), torch.rand(shape, generator=generator) * 1e-3
    codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    return codes, torch.randint(110, 130, (rows, columns // 32), generator=generator, dtype=torch.uint8)


def cpu_seconds(repeats: int, function: Callable[[], object]) -> float:
    """Least CPU time of a call."""
    best = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        function()
        best = min(best, time.process_time() - start)
    return best


def same(made: cuda_ops.Packed, expected: tuple[Tensor, Tensor, Tensor, int]) -> bool:
    assert made.zero_point is not None
    pairs = ((made.packed, expected[0]), (made.scale.view(torch.int16), expected[1].view(torch.int16)))
    return all(torch.equal(a, b) for a, b in (*pairs, (made.zero_point, expected[2])))


def measure(kind: str, isa: str, rows: int, columns: int, repeats: int, copy_bytes_per_s: float) -> list[Any] | None:
    """A line of the table, None without the instructions; a quarter of the rows is checked and timed the slow road."""
    weight, scale = stored(kind, rows, columns)
    few = max(128, rows // 4)
    part = (weight[:few], None if scale is None else scale[: few // 128 if kind == "fp8" else few])
    expected = reference.pack_weights(*part, (128, 128), GROUP, False)
    with cuda_ops.limited_to(isa) as available:
        if not available:
            return None
        if not same(cuda_ops.pack_weights(*part, group_size=GROUP), expected):
            raise SystemExit(f"wrong: {kind} with {isa} differs from the reference")
        seconds = cpu_seconds(repeats, lambda: cuda_ops.pack_weights(weight, scale, group_size=GROUP))
    slow = cpu_seconds(1, lambda: reference.pack_weights(*part, (128, 128), GROUP, False)) / few * rows
    parameters = rows * columns
    moved = weight.numel() * weight.element_size() + parameters / 2
    rate = parameters / seconds
    return [kind, isa, rate / 1e6, moved / copy_bytes_per_s / seconds, slow / seconds, rate / BAR]


def main() -> None:
    """Measure every format and set of instructions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=7168)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = torch.ones(options.rows * options.columns, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copy = source.numel() * 4 / cpu_seconds(options.repeats, lambda: target.copy_(source))
    lines, load = [], round(os.getloadavg()[0], 2)
    for kind in ("bfloat16", "fp8", "mxfp4"):
        for isa in reversed(ops.ISA):
            line = measure(kind, isa, options.rows, options.columns, options.repeats if isa != "scalar" else 1, copy)
            if line is not None:
                lines.append(line)
    facts = {
        "weight": [options.rows, options.columns],
        "group_size": GROUP,
        "threads": 1,
        "copy_bytes_per_s": round(copy),
        "load": load,
        "passed": all(line[-1] >= 1 for line in lines if line[1] == cuda_ops.instructions()),
    }
    present("pack", COLUMNS, lines, facts)


if __name__ == "__main__":
    main()

"""How close do our CUDA kernels that make 4-bit weights come to the memory's speed?

    python -m benchmarks.gpu_pack [--rows N] [--repeats N]

Packing, the search of ranges and the rounding of columns, each kernel of the ladder, checked first against the CPU
kernels, bit for bit. The floor is a device-to-device copy that reads and writes as many bytes together, measured in the
same run; every line is the median of CUDA-event timings, kernel and copy in turns. Search and rounding are bound by
arithmetic, so their lines say what the arithmetic costs over that floor. Shapes are those of a DeepSeek-V3 expert,
2048 x 7168. Needs torch, nvcc and a GPU; without a GPU it says "not measured".
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import cuda_ops
from benchmarks.gpu_softmax import median_ms, ready
from cuda_ops import harness_weights
from cuda_ops.harness_weights import GPTQ, PACK, Call

COLUMNS, GROUP, ROWS = 7168, 128, 2048
KINDS = ("bfloat16", "float8_e4m3fn", "mxfp4")
SHRINK = torch.linspace(1, 0.6, 12)


def stored(kind: str, rows: int) -> tuple[Tensor, Tensor | None]:
    """Random weights of standard deviation 0.02 as they are published, on the GPU."""
    if kind == "mxfp4":
        codes = torch.randint(0, 256, (rows, COLUMNS // 2), dtype=torch.uint8, device="cuda")
        return codes, torch.randint(110, 130, (rows, COLUMNS // 32), dtype=torch.uint8, device="cuda")
    weight = torch.randn(rows, COLUMNS, device="cuda") * 0.02
    if kind == "bfloat16":
        return weight.bfloat16(), None
    scale = 1e-3 * torch.rand(-(-rows // 128), COLUMNS // 128, device="cuda")
    return (weight * 4000).to(torch.float8_e4m3fn), scale


def blocks(matrices: int) -> dict[str, Tensor]:
    """A block of 128 columns of several experts, as the solver rounds it."""
    shape = (matrices, GROUP, ROWS)
    base = torch.randn(shape, device="cuda") * 0.02
    return {
        "base": base,
        "target": base + 0.001 * torch.randn(shape, device="cuda"),
        "feedback": (0.1 * torch.randn(matrices, GROUP, GROUP, device="cuda")).tril(-1),
        "scale": torch.full((matrices, 1, ROWS), 0.008, device="cuda").bfloat16().float(),
        "zero_point": torch.full((matrices, 1, ROWS), 8.0, device="cuda"),
        "group": torch.zeros(matrices, GROUP, dtype=torch.int64, device="cuda"),
    }


def check(made: list[Tensor], expected: tuple[Tensor, ...], what: str) -> None:
    """Stop where a kernel's result is not that of the CPU kernel, bit for bit."""
    for ours, cpu in zip(made, expected, strict=True):
        whole = {4: torch.int32, 2: torch.int16}.get(ours.itemsize, ours.dtype)
        if not torch.equal(ours.cpu().view(whole), cpu.view(whole)):
            raise SystemExit(f"wrong result: {what}")


def timed(what: str, weights: int, call: Call, kernels: Mapping[str, int], repeats: int) -> list[dict[str, Any]]:
    """A line of the table for each kernel that takes the job."""
    moved = sum(t.numel() * t.itemsize for t in (*call.inputs, *call.outputs))
    half = torch.empty(moved // 2, dtype=torch.uint8, device="cuda")
    other, lines = torch.empty_like(half), []
    for kernel, number in kernels.items():
        run = functools.partial(call.launch, number)
        try:
            run()
        except ValueError:
            continue
        ms, floor = median_ms(repeats, run, lambda: other.copy_(half))
        lines.append(
            {
                "what": what,
                "kernel": kernel,
                "ms": round(ms, 4),
                "copy_ms": round(floor, 4),
                "of_copy": round(floor / ms, 3),
                "g_weights_per_s": round(weights / ms / 1e6, 1),
                "gb_per_s": round(moved / ms / 1e6),
            }
        )
    return lines


def packing(kind: str, group: int, rows: int, repeats: int) -> list[dict[str, Any]]:
    """From stored bytes to packed codes; a slice is checked."""
    weight, scale = stored(kind, rows)
    few = (weight[:128].cpu(), None if scale is None else scale[: 1 if kind == "float8_e4m3fn" else 128].cpu())
    encoding = harness_weights.pack(*few, group).job.encoding
    expected = torch.ops.deepseek_compress.pack_weights(*few, encoding, 128, 128, group, False)
    for number in PACK.values():
        call = harness_weights.pack(*(None if part is None else part.cuda() for part in few), group)  # type: ignore[arg-type]
        try:
            call.launch(number)
        except ValueError:
            continue
        check(call.outputs, expected, f"pack {kind}, groups of {group}")
    return timed(f"pack {kind} g{group}", rows * COLUMNS, harness_weights.pack(weight, scale, group), PACK, repeats)


def searching(rows: int, repeats: int) -> list[dict[str, Any]]:
    """Twelve ranges and the refit for each group."""
    groups = torch.randn(rows * COLUMNS // (GROUP * ROWS), GROUP, ROWS, device="cuda") * 0.02
    importance = torch.rand(len(groups), GROUP, device="cuda")
    few = groups[:1].cpu(), importance[:1].cpu(), SHRINK, 4, False
    check(
        list(cuda_ops.search_grid(groups[:1], importance[:1], SHRINK, 4, False)), cuda_ops.search_grid(*few), "search"
    )
    call = harness_weights.search(groups, importance, SHRINK.cuda(), 4, False)
    return timed("search g128", groups.numel(), call, GPTQ, repeats)


def rounding(rows: int, repeats: int) -> list[dict[str, Any]]:
    """A block of 128 columns of one expert, and of many together."""
    lines = []
    for matrices in (1, max(1, rows * COLUMNS // (GROUP * ROWS) // 4)):
        made = blocks(matrices)
        codes = torch.empty(made["base"].shape, dtype=torch.uint8, device="cuda")
        residual, grid = torch.empty_like(made["base"]), (made["scale"], made["zero_point"], 15)
        parts = made["base"], made["target"], made["feedback"], grid, made["group"], None
        cuda_ops.round_columns(*parts, codes, residual)
        one = [made[name][:1].cpu() for name in ("base", "target", "feedback", "scale", "zero_point", "group")]
        expected = codes[:1].cpu().zero_(), residual[:1].cpu().zero_()
        cuda_ops.round_columns(*one[:3], (one[3], one[4], 15), one[5], None, *expected)
        check([codes[:1], residual[:1]], expected, "rounding")
        call = harness_weights.rounding(*parts, codes, residual)
        lines += timed(f"round 128 columns x{matrices}", codes.numel(), call, GPTQ, repeats)
    return lines


def main() -> None:
    """Measure packing in every published form, the search and the rounding; a table and one JSON line last."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=32768, help=f"rows of {COLUMNS} columns in each measurement")
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    if (name := ready("gpu_pack")) is None:
        return
    print(f"{name}; torch {torch.__version__}; {options.rows} x {COLUMNS} weights")
    lines = []
    for kind in KINDS:
        for group in (GROUP, 32, COLUMNS):
            lines += packing(kind, group, options.rows, options.repeats)
    lines += searching(options.rows, options.repeats) + rounding(options.rows, options.repeats)
    for line in lines:
        print("  ".join(f"{key} {value}" for key, value in line.items()))
    print(json.dumps({"benchmark": "gpu_pack", "measured": True, "device": name, "lines": lines}))


if __name__ == "__main__":
    main()

"""Weights and solver states for the tests of the kernels that make 4-bit weights: CPU, emulation and GPU."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ["float32", "float16", "bfloat16", "fp8", "mxfp4"]
BLOCK = (128, 128)
SHRINK = torch.tensor([1 - 0.4 * step / 11 for step in range(12)])


def weights(rows: int, columns: int) -> Tensor:
    """Float32 with what goes wrong elsewhere: zeros, one-sided groups, ties at half a step, tiny and huge rows."""
    generator = torch.Generator().manual_seed(rows * columns)
    w = torch.randn(rows, columns, generator=generator) * 0.02
    w[0] = 0
    w[rows // 2] = w[rows // 2].abs() + 0.5
    w[-1] = -w[-1].abs()
    if rows > 5:
        w[1] = torch.arange(columns) % 31 / 2 - 7.5
        w[2] *= 1e-28
        w[3] *= 1e37
        w[4, ::3] = 0
        w[5] = torch.where(w[5] > 0, 1e-38, -3e-39)  # subnormal: becomes a group of zeros
    return w


def stored(kind: str, rows: int, columns: int) -> tuple[Tensor, Tensor | None]:
    """A weight in one of the published forms and its scale."""
    generator = torch.Generator().manual_seed(7)
    w = weights(rows, columns)
    if kind == "fp8":
        codes = torch.randint(0, 256, (rows, columns), generator=generator, dtype=torch.uint8)
        codes[codes & 0x7F == 0x7F] = 0x08  # NaN -> the smallest normal number
        scale = torch.rand(-(-rows // BLOCK[0]), -(-columns // BLOCK[1]), generator=generator) * 1e-3
        return codes.view(torch.float8_e4m3fn), scale
    if kind == "mxfp4":
        codes = torch.randint(0, 256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
        scale = torch.randint(0, 250, (rows, columns // 32), generator=generator, dtype=torch.uint8)
        return codes.view(torch.int8), scale.view(torch.float8_e8m0fnu)
    dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[kind]
    return w.clamp(-6e4, 6e4).to(dtype), None


def groups(count: int, size: int, rows: int) -> tuple[Tensor, Tensor]:
    """Groups with outliers, one all zeros, one row all negative, and what their errors cost."""
    generator = torch.Generator().manual_seed(count)
    made = torch.randn(count, size, rows, generator=generator) ** 3
    made[0, :, 0] = 0
    made[-1, :, -1] = -made[-1, :, -1].abs() - 1
    return made, torch.rand(count, size, generator=generator)


def block(columns: int, rows: int, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    base = torch.randn(columns, rows, generator=generator)
    return {
        "base": base,
        "target": base + 0.1 * torch.randn(columns, rows, generator=generator),
        "feedback": (0.3 * torch.randn(columns, columns, generator=generator)).tril(-1),
        "scale": (0.1 + 0.3 * torch.rand(count, rows, generator=generator)).bfloat16().float(),
        "zero_point": torch.randint(0, 16, (count, rows), generator=generator).float(),
        "group": torch.randint(0, count, (columns,), generator=generator),
        "fixed": torch.rand(columns, rows, generator=generator) < 0.5,
    }


def batch(matrices: int, columns: int, rows: int, count: int) -> dict[str, Tensor]:
    """Blocks of several matrices, all different."""
    made = [block(columns, rows, count) for _ in range(matrices)]
    for m, one in enumerate(made):
        one["base"], one["group"] = one["base"] * (1 + 0.3 * m), one["group"].roll(m)
        one["feedback"] = one["feedback"] * (1 - 0.1 * m)
    return {name: torch.stack([one[name] for one in made]) for name in made[0]}

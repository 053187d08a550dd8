"""Rounding to 8 and 4 bits and back, where the published DeepSeek-V4.1 rounds what attention reads.

    fp8:       s = 2^ceil(log2(max(|x|, 1e-4) / 448)) for 32 values;         e4m3(x / s) s
    fp4:       s = 2^ceil(log2(max(|x|, 6 2^-126) / 6)) for 32 values;       e2m1(x / s) s
    fp4_e4m3:  s = e4m3(max(|x|, 6 2^-9) / 6) for 16 values;                 e2m1(x / s) s

e2m1 rounds to the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6, ties to the even code. This belongs to the model, whatever its
weights are stored in. Source: DeepSeek-V4.1-Flash, inference/kernel.py (act_quant, fp4_act_quant).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

E4M3_MAX, E2M1_MAX = 448.0, 6.0
# Reciprocals as the kernels hold them, in float32
INVERSE_448, INVERSE_6 = float(np.float32(1 / 448)), float(np.float32(1 / 6))
GRID = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])


def fp8(x: Tensor, block: int = 32) -> Tensor:
    """x (..., columns) as e4m3 with a power of two for each `block` columns."""
    groups, largest = _grouped(x, block, 1e-4)
    scale = power_above(largest * INVERSE_448)
    codes = (groups / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.to(x.dtype) * scale).view(x.shape)


def fp4(x: Tensor, block: int = 32) -> Tensor:
    """x (..., columns) as e2m1 with a power of two for each `block` columns."""
    groups, largest = _grouped(x, block, 6 * 2.0**-126)
    scale = power_above(largest * INVERSE_6)
    return (e2m1(groups / scale) * scale).view(x.shape)


def fp4_e4m3(x: Tensor, block: int = 16) -> Tensor:
    """x (..., columns) as e2m1 with an e4m3 scale for each `block` columns."""
    groups, largest = _grouped(x, block, 6 * 2.0**-9)
    scale = (largest / E2M1_MAX).to(torch.float8_e4m3fn).to(x.dtype)
    return (e2m1(groups / scale) * scale).view(x.shape)


def power_above(x: Tensor) -> Tensor:
    """Return the least power of two that is not below x > 0."""
    mantissa, exponent = torch.frexp(x)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())


def e2m1(x: Tensor) -> Tensor:
    """x rounded to the values of four bits, what is larger to 6."""
    size = x.abs().contiguous()
    middles, grid = MIDDLES.to(x.device, x.dtype), GRID.to(x.device, x.dtype)
    code = torch.bucketize(size, middles)  # of two that are as near, the smaller ...
    tie = (code < 7) & (size == middles[code.clamp(max=6)]) & (code % 2 == 1)
    return torch.copysign(grid[code + tie.long()], x)  # ... unless the larger is even


def _grouped(x: Tensor, block: int, least: float) -> tuple[Tensor, Tensor]:
    """x as (..., groups, block), and the largest magnitude of each group (..., groups, 1)."""
    groups = x.reshape(*x.shape[:-1], x.shape[-1] // block, block)
    return groups, groups.abs().amax(-1, keepdim=True).clamp(min=least)

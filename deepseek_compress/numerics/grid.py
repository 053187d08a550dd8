"""The values that a group of weights may take: `(code - zero_point) * scale`, code and zero point whole.

Everything here works on *columns-first* groups, shape (..., group_size, rows), because then each step of a solver
touches contiguous memory. The scale is rounded to the type it is stored in before anything else uses it: BF16
rounding moves code 15 by up to 0.06 of a step, and an error measured with another scale is not the error that ships.
The range of a group always includes 0, so that 0 (and with it 2:4 sparsity) is exactly on the grid.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

import cuda_ops
from cuda_ops import reference
from deepseek_compress.errors import DscError
from deepseek_compress.numerics.types import Quantized

STORED = torch.bfloat16


class Grid(NamedTuple):
    """Scale and zero point of groups, each (..., rows), float32; `top` is the largest code."""

    scale: Tensor
    zero_point: Tensor
    top: int

    def round(self, weight: Tensor) -> Tensor:
        """Nearest grid value of `weight` (..., group_size, rows), in units of `scale` and relative to zero."""
        zero = self.zero_point.unsqueeze(-2)
        return (weight / self.scale.unsqueeze(-2)).round_().clamp_(-zero, self.top - zero)


def fit_group_size(columns: int, group_size: int | None) -> int:
    """`group_size`, or where it is None the largest of 128, 64, 32 that divides (else one group a row).

    Raises `DscError` when `group_size` does not divide `columns`.
    """
    if group_size is None:
        return next((size for size in (128, 64, 32) if columns % size == 0), columns)
    if columns % group_size:
        fits = [size for size in (128, 64, 32, 16) if columns % size == 0]
        raise DscError(
            f"{columns} columns do not divide into groups of {group_size}", f"set group_size: {(fits or [columns])[0]}"
        )
    return group_size


def columns_first(weight: Tensor, group_size: int) -> Tensor:
    """(rows, columns) -> a new contiguous (groups, group_size, rows)."""
    rows, columns = weight.shape
    return weight.t().reshape(columns // group_size, group_size, rows).contiguous()


def fit(low: Tensor, high: Tensor, num_bits: int, symmetric: bool) -> Grid:
    """Return the grid that spans low .. high (each (..., rows)), widened to include 0.

    Asymmetric: `scale = (high - low) / top`, `zero_point = round(-low / scale)`. Symmetric: the zero point is the
    middle code and the scale covers the longer side. The scale is rounded to its stored type first; that of a group
    of zeros is 1.
    """
    return Grid(*reference.fit(low, high, num_bits, symmetric), 2**num_bits - 1)


def minmax(groups: Tensor, num_bits: int, symmetric: bool) -> Grid:
    """Return the grid from the smallest to the largest weight of each group (..., group_size, rows)."""
    return fit(groups.amin(-2), groups.amax(-2), num_bits, symmetric)


def search(
    groups: Tensor,
    num_bits: int,
    symmetric: bool,
    importance: Tensor | None = None,
    steps: int = 12,
    least: float = 0.6,
) -> Grid:
    """Return the grid with the least (weighted) squared error among `steps` ranges shrunk evenly down to `least`.

    `groups` (..., group_size, rows), `importance` (..., group_size, 1) or None. Each winner is then refitted once:
    with its codes held, the least-squares scale, kept where it is better. Never worse than `minmax`.
    """
    shrink = _shrink(steps, least, groups.device)
    size, rows = groups.shape[-2:]
    shares = None if importance is None else importance.expand(*groups.shape[:-1], 1).reshape(-1, size)
    found = cuda_ops.search_grid(groups.reshape(-1, size, rows), shares, shrink, num_bits, symmetric)
    scale, zero_point = (part.view(*groups.shape[:-2], rows) for part in found)
    return Grid(scale, zero_point, 2**num_bits - 1)


@functools.cache
def _shrink(steps: int, least: float, device: torch.device) -> Tensor:
    """Return the ranges that are tried; kept, since a copy to a GPU is waited for."""
    return torch.tensor([1 - (1 - least) * step / max(1, steps - 1) for step in range(steps)]).to(device)


def quantized(groups: Tensor, grid: Grid, num_bits: int, symmetric: bool) -> Quantized:
    """Round columns-first `groups` (groups, group_size, rows) to their `grid` ((groups, rows) each)."""
    codes = grid.round(groups).add_(grid.zero_point.unsqueeze(-2))
    rows = groups.shape[-1]
    return Quantized(
        codes.to(torch.uint8).reshape(-1, rows).t().contiguous(),
        grid.scale.t().contiguous(),
        grid.zero_point.to(torch.uint8).t().contiguous(),
        num_bits,
        symmetric,
    )

"""The values that a group of weights may take: `(code - zero_point) * scale`, code and zero point whole.

Everything here works on *columns-first* groups, shape (..., group_size, rows), because then each step of a solver
touches contiguous memory. The scale is rounded to the type it is stored in before anything else uses it: BF16
rounding moves code 15 by up to 0.06 of a step, and an error measured with another scale is not the error that ships.
The range of a group always includes 0, so that 0 (and with it 2:4 sparsity) is exactly on the grid.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.numerics.types import Quantized

STORED = torch.bfloat16
_SMALLEST = 1e-30  # a range below this is a group of zeros: scale 1, every code the zero point
_CHUNK = 1 << 16  # elements; temporaries of this size stay in the second-level cache


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
    """The grid that spans low .. high (each (..., rows)), widened to include 0.

    Asymmetric: `scale = (high - low) / top`, `zero_point = round(-low / scale)`. Symmetric: the zero point is the
    middle code and the scale covers the longer side. The scale is rounded to its stored type first.
    """
    top, low, high = 2**num_bits - 1, low.clamp(max=0), high.clamp(min=0)
    middle = (top + 1) // 2
    scale = torch.maximum(low / -middle, high / (top - middle)) if symmetric else (high - low) / top
    scale = torch.where(scale > _SMALLEST, scale, torch.ones_like(scale)).to(STORED).float()
    zero_point = torch.full_like(scale, middle) if symmetric else (low / -scale).round_().clamp_(0, top)
    return Grid(scale, zero_point, top)


def minmax(groups: Tensor, num_bits: int, symmetric: bool) -> Grid:
    """The grid from the smallest to the largest weight of each group (..., group_size, rows)."""
    return fit(groups.amin(-2), groups.amax(-2), num_bits, symmetric)


def error(groups: Tensor, grid: Grid, importance: Tensor | None = None) -> Tensor:
    """Sum over the group of `importance * (rounded - weight)^2`: (..., rows). `importance` (..., group_size, 1)."""
    scaled = groups / grid.scale.unsqueeze(-2)
    zero = grid.zero_point.unsqueeze(-2)
    off = scaled.round().clamp_(-zero, grid.top - zero).sub_(scaled).square_()
    return (off if importance is None else off.mul_(importance)).sum(-2).mul_(grid.scale.square())


def search(
    groups: Tensor,
    num_bits: int,
    symmetric: bool,
    importance: Tensor | None = None,
    steps: int = 12,
    least: float = 0.6,
) -> Grid:
    """The grid with the least (weighted) squared error among `steps` ranges shrunk evenly down to `least`.

    `groups` (..., group_size, rows), `importance` (..., group_size, 1) or None. Each winner is then refitted once:
    with its codes held, the least-squares scale, kept where it is better. Never worse than `minmax`.
    """
    size = max(1, _CHUNK // groups[0].numel()) if groups.dim() > 2 else len(groups)
    if len(groups) > size:
        shares = (
            [None] * len(groups) if importance is None else torch.split(importance.expand(len(groups), -1, -1), size)
        )
        parts = [
            search(part, num_bits, symmetric, share, steps, least)
            for part, share in zip(torch.split(groups, size), shares, strict=False)
        ]
        return Grid(torch.cat([p.scale for p in parts]), torch.cat([p.zero_point for p in parts]), parts[0].top)
    low, high = groups.amin(-2), groups.amax(-2)
    best = fit(low, high, num_bits, symmetric)
    lowest = error(groups, best, importance)
    for step in range(1, steps):
        shrink = 1 - (1 - least) * step / (steps - 1)
        best, lowest = _better(groups, best, lowest, fit(low * shrink, high * shrink, num_bits, symmetric), importance)
    return _better(groups, best, lowest, _refit(groups, best, importance), importance)[0]


def _better(groups: Tensor, best: Grid, lowest: Tensor, other: Grid, importance: Tensor | None) -> tuple[Grid, Tensor]:
    found = error(groups, other, importance)
    wins = found < lowest
    scale = torch.where(wins, other.scale, best.scale)
    return Grid(scale, torch.where(wins, other.zero_point, best.zero_point), best.top), torch.where(wins, found, lowest)


def _refit(groups: Tensor, grid: Grid, importance: Tensor | None) -> Grid:
    """The same codes and zero point with the scale that minimises the weighted squared error."""
    codes = grid.round(groups)
    weighted = codes if importance is None else codes * importance
    scale = (weighted * groups).sum(-2) / (weighted * codes).sum(-2).clamp(min=_SMALLEST)
    scale = torch.where(scale > _SMALLEST, scale, grid.scale).to(STORED).float()
    return Grid(scale, grid.zero_point, grid.top)


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

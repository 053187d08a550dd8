"""QuantEase (Behdin et al. 2023, arXiv 2309.01885): coordinate descent on `tr((W - Q) H (W - Q)^T)`.

With all other columns held, the best value of column j is `q_j + G_j / H_jj`, `G = H (W - Q)^T`; it is rounded to its
grid, so no step can raise the error. GPTQ never returns to a column; these sweeps do. After each group the scale of
every row is refitted by least squares under the same H (codes and zero points held: they stay whole), rounded to its
stored type and kept only where the error falls.

A sweep costs `2 rows columns^2` multiply-adds, about as much as GPTQ itself.

Legend: columns-first tensors are (columns, rows), a group of them (group_size, rows).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepseek_compress.numerics import grid, pattern
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.hessian import damped
from deepseek_compress.numerics.types import Quantized, Statistics


class QuantEase(Gptq, frozen=True):
    """GPTQ, then coordinate descent over codes and scales until the sweeps are spent."""

    paper: ClassVar[str] = "Behdin et al. 2023, QuantEase, arXiv 2309.01885"
    sweeps: int = Field(3, ge=1)

    def __call__(self, weight: Tensor, statistics: Statistics) -> Quantized:
        """`weight` float32 (rows, columns); needs `statistics.hessian`."""
        start = super().__call__(weight, statistics)
        assert statistics.hessian is not None
        return refine(weight, start, damped(statistics.hessian, self.damping), self.sweeps)


def refine(weight: Tensor, start: Quantized, hessian: Tensor, sweeps: int) -> Quantized:
    """`start` improved in the error under `hessian` (columns, columns, damped: its diagonal is positive).

    `weight` float32 (rows, columns). Zeros of a 2:4 weight stay zeros.
    """
    size, top = start.group_size, 2**start.num_bits - 1
    groups = grid.columns_first(weight, size)
    scale, zero = start.scale.t().contiguous(), start.zero_point.t().float()  # (groups, rows)
    values = grid.columns_first(start.dequantize(), size)
    fixed = (groups == 0) if pattern.holds(weight) else None
    gradient = hessian @ (groups - values).view(-1, weight.shape[0])
    for _ in range(sweeps):
        for g in range(len(groups)):
            columns = slice(g * size, (g + 1) * size)
            own = hessian[columns, columns]
            low, high = -zero[g], top - zero[g]
            before = values[g].clone()
            pull = gradient[columns].clone()
            _codes(values[g], pull, own, scale[g], low, high, None if fixed is None else fixed[g])
            _scale(values[g], pull, own, scale[g])
            gradient.addmm_(hessian[:, columns], before.sub_(values[g]))
    return grid.quantized(values, grid.Grid(scale, zero, top), start.num_bits, start.symmetric)


def _codes(
    values: Tensor, pull: Tensor, own: Tensor, scale: Tensor, low: Tensor, high: Tensor, fixed: Tensor | None
) -> None:
    """One pass over the columns of a group; `values` and its gradient `pull` (group_size, rows) change in place."""
    diagonal = own.diagonal().tolist()
    for j in range(len(values)):
        best = torch.add(values[j], pull[j], alpha=1 / diagonal[j]).div_(scale).round_().clamp_(low, high).mul_(scale)
        if fixed is not None:
            best.masked_fill_(fixed[j], 0)
        pull.addr_(own[j], values[j] - best)
        values[j] = best


def _scale(values: Tensor, pull: Tensor, own: Tensor, scale: Tensor) -> None:
    """Least-squares `scale` (rows,) of a group with its codes held; all three change in place."""
    codes = values / scale
    curved = own @ codes
    slope, curve = (codes * pull).sum(0), (codes * curved).sum(0)
    fresh = (scale + slope / curve.clamp(min=1e-30)).to(grid.STORED).float()
    step = fresh - scale
    step = torch.where((fresh > 0) & (step * (2 * slope - step * curve) > 0), step, torch.zeros_like(step))
    scale += step
    pull.sub_(curved * step)
    torch.mul(codes.round_(), scale, out=values)

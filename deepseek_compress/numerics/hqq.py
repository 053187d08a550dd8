"""HQQ (Badri & Shaji 2023, half-quadratic quantisation): data-free, robust to outliers.

Minimises `|W - s (q - z)|_p^p`, p < 1, by alternating two closed forms: the shrinkage of the error,
`e = sign(r) max(|r| - |r|^(p-1) / beta, 0)`, and the grid that fits `W - e` best. The original moves a real-valued
zero point; ours is whole by the format, so the second step refits the scale by least squares and moves the zero point
to the nearest integer of the original's update. The iterate with the least p-norm error is kept. What the
original gains it gains by its real-valued zero points: here KL is no better than round to nearest's.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepseek_compress.numerics import grid
from deepseek_compress.numerics.types import Quantized, Statistics, WeightQuantizer


class Hqq(WeightQuantizer, frozen=True):
    """Half-quadratic search of scale and zero point under a norm that forgives outliers, data-free."""

    paper: ClassVar[str] = "Badri & Shaji 2023, Half-Quadratic Quantization, mobiusml.github.io/hqq_blog"
    norm: float = Field(0.7, gt=0, le=1)
    iterations: int = Field(20, ge=1)
    beta: float = Field(10.0, gt=0)  # in units of the weights' inverse step; grows 1 % an iteration

    def __call__(self, weight: Tensor, statistics: Statistics) -> Quantized:
        """`weight` float32 (rows, columns); `statistics` is not read."""
        groups = grid.columns_first(weight, grid.fit_group_size(weight.shape[1], self.group_size))
        best = torch.stack([torch.stack(self._search(group)) for group in groups])  # (groups, 2, rows)
        found = grid.Grid(best[:, 0], best[:, 1], 2**self.num_bits - 1)
        return grid.quantized(groups, found, self.num_bits, self.symmetric)

    def _search(self, group: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point (rows,) of one group (group_size, rows)."""
        now = grid.minmax(group, self.num_bits, self.symmetric)
        scale, zero, beta = now.scale, now.zero_point, self.beta
        lowest = torch.full_like(scale, torch.inf)
        for _ in range(self.iterations + 1):
            codes = now.round(group)
            off = group - codes * now.scale
            loss = off.abs().pow(self.norm).sum(0)
            wins = loss < lowest
            lowest = torch.where(wins, loss, lowest)
            scale, zero = torch.where(wins, now.scale, scale), torch.where(wins, now.zero_point, zero)
            now = self._fit(group - _shrink(off / now.scale, self.norm, beta) * now.scale, codes, now)
            beta *= 1.01
        return scale, zero

    def _fit(self, target: Tensor, codes: Tensor, now: grid.Grid) -> grid.Grid:
        """Return the grid whose values at `codes` (relative to the zero point) come closest to `target`."""
        moved = now.zero_point
        if not self.symmetric:
            moved = (now.zero_point + (codes - target / now.scale).mean(0)).round_().clamp_(0, now.top)
        codes = codes + (now.zero_point - moved)
        scale = (codes * target).sum(0) / codes.square().sum(0).clamp(min=1e-30)
        scale = torch.where(scale > 1e-30, scale, now.scale).to(grid.STORED).float()
        return grid.Grid(scale, moved, now.top)


def _shrink(off: Tensor, norm: float, beta: float) -> Tensor:
    """Generalised soft threshold; `off` in steps of the grid."""
    size = off.abs()
    return off.sign() * (size - size.clamp(min=1e-8).pow(norm - 1) / beta).clamp_(min=0)

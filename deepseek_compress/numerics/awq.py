"""AWQ (Lin et al. 2023, arXiv 2306.00978): protect the weights that large activations meet.

Per linear this is the search of each group's range by the error of its own outputs, `(w - q) H_gg (w - q)^T`, H_gg the
group's block of the input Hessian (section 3.2 with the clipping of the reference code), over ranges shrunk together
and to each side. `migration` finds the channel scales that the paper moves from a weight into the operation before it:
the block loop applies them, since a linear alone cannot.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepseek_compress.numerics import grid
from deepseek_compress.numerics.hessian import damped, layer_error
from deepseek_compress.numerics.types import Quantized, Statistics, WeightQuantizer


class Awq(WeightQuantizer, frozen=True):
    """Activation-aware ranges: each group clipped where its own outputs suffer least."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    paper: ClassVar[str] = "Lin et al. 2023, AWQ, arXiv 2306.00978"
    steps: int = Field(10, ge=1)  # ranges tried, shrunk evenly down to `least`
    least: float = Field(0.5, gt=0, le=1)
    damping: float = Field(0.01, ge=0)

    def __call__(self, weight: Tensor, statistics: Statistics) -> Quantized:
        """`weight` float32 (rows, columns); needs `statistics.hessian`."""
        assert statistics.hessian is not None, "awq needs the Hessian: see `needs`"
        groups = grid.columns_first(weight, grid.fit_group_size(weight.shape[1], self.group_size))
        size = groups.shape[1]
        own = damped(statistics.hessian, self.damping).unfold(0, size, size).unfold(1, size, size)
        found = [self._search(group, own[g, g]) for g, group in enumerate(groups)]
        best = grid.Grid(
            torch.stack([f.scale for f in found]), torch.stack([f.zero_point for f in found]), found[0].top
        )
        return grid.quantized(groups, best, self.num_bits, self.symmetric)

    def _search(self, group: Tensor, own: Tensor) -> grid.Grid:
        """`group` (group_size, rows), `own` (group_size, group_size) its block of the Hessian."""
        low, high = group.amin(-2), group.amax(-2)
        best = grid.minmax(group, self.num_bits, self.symmetric)
        lowest = _output_error(group, best, own)
        for step in range(1, self.steps + 1):
            shrink = 1 - (1 - self.least) * step / self.steps
            other = grid.fit(low * shrink, high * shrink, self.num_bits, self.symmetric)
            error = _output_error(group, other, own)
            wins = error < lowest
            lowest = torch.where(wins, error, lowest)
            scale = torch.where(wins, other.scale, best.scale)
            best = grid.Grid(scale, torch.where(wins, other.zero_point, best.zero_point), best.top)
        return best


def _output_error(group: Tensor, grids: grid.Grid, own: Tensor) -> Tensor:
    off = grids.round(group).mul_(grids.scale) - group
    return ((own @ off) * off).sum(0)


def migration(weights: list[Tensor], statistics: Statistics, quantizer: WeightQuantizer, steps: int = 20) -> Tensor:
    """Return the channel scales (columns,) with which `weights * scales`, rounded, lose least (AWQ equation 4 and 5).

    `weights` are all linears with this input, each (rows, columns); `scales = mean|x|^alpha`, alpha searched in
    `steps` from 0 (no migration). The operation before them must be divided by the result.
    """
    assert statistics.hessian is not None, "needs the Hessian"
    assert statistics.input_absmean is not None, "needs the mean absolute input"
    size = statistics.input_absmean.clamp(min=1e-8)
    best, lowest = torch.ones_like(size), float("inf")
    for step in range(steps):
        scales = size ** (step / steps)
        scales = scales / (scales.max() * scales.min()).sqrt()
        inner = statistics._replace(hessian=statistics.hessian / scales[:, None] / scales[None, :], factor=None)
        error = sum(
            layer_error(w, quantizer(w * scales, inner).dequantize() / scales, statistics.hessian) for w in weights
        )
        if error < lowest:
            best, lowest = scales, error
    return best

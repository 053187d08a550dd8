"""Learned rounding by signed gradient descent (Cheng et al. 2023, AutoRound / SignRound, arXiv 2309.05516).

Each weight gets an offset V in [-1/2, 1/2] before rounding and each group two range multipliers in [1/2, 1]; all move
by the sign of the gradient of the layer's output error, with straight-through rounding and a step that falls to zero.
The error is taken through the Hessian, `tr((W - Q) H (W - Q)^T)`, so no activations are kept and the method stays a
pure function of weight and statistics. Left out: the block-wise loss of the paper. The best iterate is kept.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepseek_compress.numerics import grid, pattern
from deepseek_compress.numerics.hessian import damped
from deepseek_compress.numerics.types import Quantized, Statistics, WeightQuantizer


class Learned(WeightQuantizer, frozen=True):
    """Rounding offsets and ranges learned by signed gradient descent on the layer's output error."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    paper: ClassVar[str] = "Cheng et al. 2023, AutoRound, arXiv 2309.05516"
    iterations: int = Field(100, ge=1)
    damping: float = Field(0.01, ge=0)

    def __call__(self, weight: Tensor, statistics: Statistics) -> Quantized:
        """`weight` float32 (rows, columns); needs `statistics.hessian`."""
        assert statistics.hessian is not None, "learned rounding needs the Hessian: see `needs`"
        hessian = damped(statistics.hessian, self.damping)
        rows, columns = weight.shape
        groups = grid.columns_first(weight, grid.fit_group_size(columns, self.group_size))
        fixed = groups == 0 if pattern.holds(weight) else None
        offset = torch.zeros_like(groups)
        shrink = torch.ones((2, groups.shape[0], rows), device=weight.device)
        best, lowest = grid.minmax(groups, self.num_bits, self.symmetric), torch.full((rows,), torch.inf).to(weight)
        kept = groups
        for step in range(self.iterations + 1):
            with torch.enable_grad():
                moving = (offset.requires_grad_(), shrink.requires_grad_())
                values, now = self._values(groups, *moving)
                off = (values if fixed is None else values.masked_fill(fixed, 0)) - groups
            pull = (hessian @ off.detach().view(columns, rows)).view_as(groups)  # half the error's gradient by Q
            loss = (pull * off.detach()).sum((0, 1))
            by_offset, by_shrink = torch.autograd.grad(off, moving, pull)
            wins, lowest = loss < lowest, torch.minimum(lowest, loss)
            kept = torch.where(wins, off.detach() + groups, kept)
            scale = torch.where(wins, now.scale.detach(), best.scale)
            best = grid.Grid(scale, torch.where(wins, now.zero_point.detach(), best.zero_point), best.top)
            rate = (1 - step / self.iterations) / self.iterations
            offset = (offset.detach() - rate * by_offset.sign()).clamp_(-0.5, 0.5)
            shrink = (shrink.detach() - rate * by_shrink.sign()).clamp_(0.5, 1)
        return grid.quantized(kept, best, self.num_bits, self.symmetric)

    def _values(self, groups: Tensor, offset: Tensor, shrink: Tensor) -> tuple[Tensor, grid.Grid]:
        """Return the rounded groups and their grid, differentiable by `offset` and `shrink` (2, groups, rows: low,
        high)."""
        low, high = groups.amin(-2).clamp(max=0) * shrink[0], groups.amax(-2).clamp(min=0) * shrink[1]
        stored = grid.fit(low.detach(), high.detach(), self.num_bits, self.symmetric)
        top, middle = stored.top, (stored.top + 1) // 2
        exact = torch.maximum(low / -middle, high / (top - middle)) if self.symmetric else (high - low) / top
        scale = exact + (stored.scale - exact).detach()
        zero = stored.zero_point if self.symmetric else through(-low / scale)
        now, zero = grid.Grid(scale, zero, top), zero.unsqueeze(-2)
        codes = through(groups / scale.unsqueeze(-2) + offset)
        codes = torch.minimum(torch.maximum(codes, -zero), top - zero)
        return codes * scale.unsqueeze(-2), now


def through(x: Tensor) -> Tensor:
    """`round(x)` whose gradient is that of `x` (straight-through)."""
    return x + (x.round() - x).detach()

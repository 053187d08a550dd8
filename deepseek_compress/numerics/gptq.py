"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round column by column, compensating each error in later columns.

    q_j = round(w_j + sum_{i<j} F_ji (w_i - q_i))

with F and D from one factor of the Hessian H = sum_t x_t x_t^T (see `hessian`, also for why this equals the paper's
updates by H^-1). An error e of column j costs D_j e^2 of the output's squared error.

`act_order` is the order of the columns: those with the largest inputs first, while later columns can still compensate.
The layout stores no permutation, so a column keeps its group:

- `group`: groups in order of their summed inputs, columns within each group likewise; the range of a group is
  searched when the solver reaches it, from the updated weights, each weighted by what its error will cost (D).
- `column`: all columns by their inputs ("static groups"); the ranges come from the original weights.
- `none`: in storage order.

Zeros of a 2:4 weight stay zeros: the entry is fixed at 0, and its error is fed forward like any other.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

import cuda_ops
from deepseek_compress.numerics import grid, pattern
from deepseek_compress.numerics.hessian import factorize, solve
from deepseek_compress.numerics.types import Factor, Quantized, Statistics, WeightQuantizer


class Gptq(WeightQuantizer, frozen=True):
    """Second-order rounding: each column's error is compensated by the columns not yet rounded."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    paper: ClassVar[str] = "Frantar et al. 2022, GPTQ, arXiv 2210.17323"
    act_order: Literal["group", "column", "none"] = "group"
    mse: bool = True  # search each range for the least squared error; False: smallest to largest
    damping: float = Field(0.005, ge=0)  # share of the mean of the Hessian's diagonal

    def prepare(self, statistics: Statistics) -> Statistics:
        """Factor the Hessian once for all linears with this input."""
        return statistics._replace(factor=self._factor(statistics))

    def __call__(self, weight: Tensor, statistics: Statistics) -> Quantized:
        """`weight` float32 (rows, columns); needs `statistics.hessian` or what `prepare` made of it."""
        factor = self._factor(statistics)
        size = grid.fit_group_size(weight.shape[1], self.group_size)
        target = weight.t().contiguous()[factor.order]
        rounding = _Rounding(self, weight, target, factor, size)
        solve(target, factor, rounding, cut=size if rounding.late else None)
        codes = torch.empty_like(rounding.codes)
        codes[factor.order] = rounding.codes
        scale, zero_point = (part.t().contiguous() for part in (rounding.grids.scale, rounding.grids.zero_point))
        return Quantized(codes.t().contiguous(), scale, zero_point.to(torch.uint8), self.num_bits, self.symmetric)

    def _factor(self, statistics: Statistics) -> Factor:
        assert statistics.hessian is not None, f"{type(self).__name__} needs the Hessian: see `needs`"
        hessian = statistics.hessian
        size = grid.fit_group_size(len(hessian), self.group_size) if self.act_order == "group" else None
        key = (self.act_order, size, self.damping)
        if statistics.factor is not None and statistics.factor.key == key:
            return statistics.factor
        return factorize(hessian, solving_order(hessian, self.act_order, size), self.damping, key)


def solving_order(hessian: Tensor, act_order: str, group_size: int | None) -> Tensor:
    """int64 (columns,): the column to solve at each step."""
    inputs = hessian.diagonal()
    if act_order == "none":
        return torch.arange(len(inputs), device=inputs.device)
    if act_order == "column":
        return torch.argsort(inputs, descending=True, stable=True)
    assert group_size is not None
    grouped = inputs.view(-1, group_size)
    first = torch.argsort(grouped.sum(1), descending=True, stable=True)
    within = torch.argsort(grouped, dim=1, descending=True, stable=True)
    return (within + group_size * torch.arange(len(grouped), device=inputs.device)[:, None])[first].flatten()


class _Rounding:
    """Rounds the columns of a block; the grids of groups are found as the solver reaches them."""

    def __init__(self, knobs: Gptq, weight: Tensor, target: Tensor, factor: Factor, size: int) -> None:
        self.knobs, self.target, self.factor, self.size = knobs, target, factor, size
        self.fixed = target == 0 if pattern.holds(weight) else None
        self.codes = torch.empty_like(target, dtype=torch.uint8)  # (columns, rows) in solving order
        self.group = factor.order // size
        self.late = knobs.act_order != "column"  # ranges from the updated weights, group by group
        if self.late:
            empty = target.new_empty(target.shape[0] // size, target.shape[1])
            self.grids = grid.Grid(empty, empty.clone(), 2**knobs.num_bits - 1)
        else:
            cost = torch.empty_like(factor.cost)
            cost[factor.order] = factor.cost
            self.grids = self._find(grid.columns_first(weight, size), cost.view(-1, size, 1))

    def _find(self, groups: Tensor, cost: Tensor) -> grid.Grid:
        knobs = self.knobs
        if not knobs.mse:
            return grid.minmax(groups, knobs.num_bits, knobs.symmetric)
        return grid.search(groups, knobs.num_bits, knobs.symmetric, cost)

    def __call__(self, start: int, base: Tensor, residual: Tensor) -> None:
        """See `hessian.solve`: columns of one group, or of any where the grids are there before."""
        stop = start + len(base)
        if self.late and start % self.size == 0:
            self._begin(start, base, residual)
        own, fixed = self.factor.feedback[start:stop, start:stop], self.fixed
        cuda_ops.round_columns(
            base,
            self.target[start:stop],
            own,
            self.grids,
            self.group[start:stop],
            None if fixed is None else fixed[start:stop],
            self.codes[start:stop],
            residual[start:stop],
        )

    def _begin(self, start: int, base: Tensor, residual: Tensor) -> None:
        """Fit the grid of the group that starts at step `start` to its updated weights, (size, rows)."""
        steps = slice(start, start + self.size)
        target, feedback = self.target[steps], self.factor.feedback[steps]
        updated = target
        if start:
            if len(base) < self.size:  # a group of several blocks
                base = torch.addmm(target, feedback[:, :start], residual[:start])
            updated = cuda_ops.unrounded(base, target, feedback[:, steps])
        if self.fixed is not None:
            updated = updated.masked_fill(self.fixed[steps], 0)
        found = self._find(updated, self.factor.cost[steps, None])
        group = self.group[start : start + 1]  # as a tensor: its value would have to be waited for
        self.grids.scale.index_copy_(0, group, found.scale[None])
        self.grids.zero_point.index_copy_(0, group, found.zero_point[None])

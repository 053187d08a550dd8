"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round column by column, each error made good by the later columns.

The order of the columns (`act_order`, section "additional tricks" of the reference code): the ones with the largest
inputs first, while their errors can still be corrected. Nothing but the grid is stored, so a column keeps its group:

- `group`: groups in order of their summed inputs, columns within each group likewise; the range of a group is
  searched when the solver reaches it, from the updated weights, each weighted by what its error will cost (D).
- `column`: all columns by their inputs ("static groups"); the ranges come from the original weights.
- `none`: as they stand.

Zeros of a 2:4 weight stay zeros: such a column is fixed at 0 and its error is fed forward like any other.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

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
        groups = grid.columns_first(weight, size)
        target = groups.view(-1, weight.shape[0])[factor.order]
        fixed = target == 0 if pattern.holds(weight) else None
        grids = _Grids(self, groups, factor, size, fixed)
        solution = solve(target, factor, grids.choose, grids.begin if grids.late else None, run=size)
        values = torch.empty_like(solution)
        values[factor.order] = solution
        return grid.quantized(values.view_as(groups), grids.all, self.num_bits, self.symmetric)

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


class _Grids:
    """The grids of all groups, filled while the solver goes, and the rounding of one column to its own."""

    def __init__(self, knobs: Gptq, groups: Tensor, factor: Factor, size: int, fixed: Tensor | None) -> None:
        self.knobs, self.factor, self.fixed = knobs, factor, fixed
        self.group_of: list[int] = (factor.order // size).tolist()
        self.late = knobs.act_order != "column"  # ranges from the updated weights, group by group
        cost = torch.empty_like(factor.cost)
        cost[factor.order] = factor.cost
        empty = torch.empty_like(groups[:, 0])
        self.all = grid.Grid(empty, empty.clone(), 2**knobs.num_bits - 1) if self.late else self._find(groups, cost)
        self.low, self.high = -self.all.zero_point, self.all.top - self.all.zero_point  # codes relative to zero

    def _find(self, groups: Tensor, cost: Tensor) -> grid.Grid:
        knobs = self.knobs
        if not knobs.mse:
            return grid.minmax(groups, knobs.num_bits, knobs.symmetric)
        importance = cost.view(*groups.shape[:-1], 1)
        return grid.search(groups, knobs.num_bits, knobs.symmetric, importance)

    def begin(self, j: int, updated: Tensor) -> None:
        """Fit the grid of the group that starts at step `j` to its `updated` weights (group_size, rows)."""
        steps = slice(j, j + len(updated))
        if self.fixed is not None:
            updated = updated.masked_fill(self.fixed[steps], 0)
        found = self._find(updated, self.factor.cost[steps])
        group = self.group_of[j]
        self.all.scale[group], self.all.zero_point[group] = found.scale, found.zero_point
        self.low[group], self.high[group] = -found.zero_point, found.top - found.zero_point

    def choose(self, j: int, updated: Tensor) -> Tensor:
        """The grid value of each row for the column solved at step `j`; `updated` is used up."""
        group = self.group_of[j]
        scale = self.all.scale[group]
        value = updated.div_(scale).round_().clamp_(self.low[group], self.high[group]).mul_(scale)
        return value if self.fixed is None else value.masked_fill_(self.fixed[j], 0)

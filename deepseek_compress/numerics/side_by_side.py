"""GPTQ of several matrices of one shape, step by step together: for a device that one alone leaves idle.

The steps that wait for each other (panels of a factor, the search of a range, the rounding of a block's columns) are
one call for all matrices; the products, which fill a device by themselves, are one call a matrix, of the same shapes as
in `hessian.solve`. So each matrix gets the bits that it gets alone.

Legend: B matrices; columns-first tensors are (B, columns, rows).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import cuda_ops
from deepseek_compress.numerics import grid, hessian, pattern
from deepseek_compress.numerics.gptq import Gptq, solving_order
from deepseek_compress.numerics.types import Factor, Quantized, Statistics, WeightQuantizer


def fits(weights: Sequence[Tensor], quantizers: Sequence[WeightQuantizer | None]) -> bool:
    """Whether these can be solved together: plain GPTQ with ranges group by group, one shape, no 2:4 zeros."""
    first = quantizers[0]
    if type(first) is not Gptq or not first.mse or first.act_order == "column":
        return False
    alike = all(its == first for its in quantizers) and len({weight.shape for weight in weights}) == 1
    return alike and not any(pattern.holds(weight) for weight in weights)


def prepare(quantizer: Gptq, statistics: Sequence[Statistics]) -> list[Statistics]:
    """`Gptq.prepare` for inputs of one width: their factors, made together."""
    hessians = [its.hessian for its in statistics if its.hessian is not None]
    size = grid.fit_group_size(len(hessians[0]), quantizer.group_size) if quantizer.act_order == "group" else None
    orders = [solving_order(h, quantizer.act_order, size) for h in hessians]
    key = (quantizer.act_order, size, quantizer.damping)
    factors = factorize(hessians, orders, quantizer.damping, key)
    return [its._replace(factor=factor) for its, factor in zip(statistics, factors, strict=True)]


def factorize(
    hessians: Sequence[Tensor], orders: Sequence[Tensor], damping: float, key: tuple[object, ...]
) -> list[Factor]:
    """`hessian.factorize` of each. One that needs more damping than it is given is made again by itself."""
    matrices = torch.stack([h[order.flip(0)][:, order.flip(0)] for h, order in zip(hessians, orders, strict=True)])
    for matrix in matrices:
        hessian.damp(matrix, damping)
    failed = _cholesky(matrices).tolist()
    return [
        hessian.factorize(h, order, damping, key) if bad else hessian.factor_of(matrix, order, key)
        for h, order, matrix, bad in zip(hessians, orders, matrices, failed, strict=True)
    ]


def _cholesky(matrices: Tensor) -> Tensor:
    """`hessian.cholesky` of (B, columns, columns), in place; bool (B,): where there is none."""
    columns, width = matrices.shape[1], hessian.CHOLESKY
    failed = torch.zeros(len(matrices), dtype=torch.bool, device=matrices.device)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        for matrix in matrices:
            above = matrix[:start, start:]
            matrix[start:stop, start:].addmm_(above[:, : stop - start].t(), above, alpha=-1)
        own, info = torch.linalg.cholesky_ex(matrices[:, start:stop, start:stop], upper=True)
        failed |= info.bool() | ~own.diagonal(dim1=1, dim2=2).isfinite().all(1)
        matrices[:, start:stop, start:stop] = own
        if stop < columns:
            rest = matrices[:, start:stop, stop:]
            rest.copy_(torch.linalg.solve_triangular(own.mT, rest, upper=False))
    return failed


def quantize(quantizer: Gptq, weights: Sequence[Tensor], prepared: Sequence[Statistics]) -> list[Quantized]:
    """Return what `quantizer` makes of each float32 (rows, columns) with its own input's factor."""
    factors = [its.factor for its in prepared if its.factor is not None]
    size = grid.fit_group_size(weights[0].shape[1], quantizer.group_size)
    target = torch.stack([w.t().contiguous()[f.order] for w, f in zip(weights, factors, strict=True)])
    rounding = _Rounding(quantizer, target, factors, size)
    _solve(target, factors, rounding, size)
    found = []
    for number, factor in enumerate(factors):
        codes = torch.empty_like(rounding.codes[number])
        codes[factor.order] = rounding.codes[number]
        scale, zero = rounding.scale[number].t().contiguous(), rounding.zero[number].t().contiguous()
        codes = codes.t().contiguous()
        found.append(Quantized(codes, scale, zero.to(torch.uint8), quantizer.num_bits, quantizer.symmetric))
    return found


def _solve(target: Tensor, factors: Sequence[Factor], fix: _Rounding, cut: int) -> None:
    """`hessian.solve` of each matrix, its blocks fixed together."""
    columns = target.shape[1]
    residual = torch.empty_like(target)
    panel = target[:, :0]
    first = stop = 0  # the panel's columns
    for start, end in hessian.blocks(columns, hessian.WIDTH, cut):
        if end > stop:
            first, stop = start, hessian.panel_end(start, end, columns)
            panel = torch.empty_like(target[:, first:stop])
            for each, factor, whole, fixed in zip(panel, factors, target, residual, strict=True):
                torch.addmm(whole[first:stop], factor.feedback[first:stop, :first], fixed[:first], out=each)
        base = panel[:, start - first : end - first]
        if start > first:
            for each, factor, fixed in zip(base, factors, residual, strict=True):
                each.addmm_(factor.feedback[start:end, first:start], fixed[first:start])
        fix(start, base, residual)


class _Rounding:
    """`gptq._Rounding` for matrices side by side."""

    def __init__(self, knobs: Gptq, target: Tensor, factors: Sequence[Factor], size: int) -> None:
        self.knobs, self.target, self.factors, self.size = knobs, target, factors, size
        self.codes = torch.empty_like(target, dtype=torch.uint8)
        self.group = torch.stack([factor.order for factor in factors]) // size  # (B, columns)
        self.cost = torch.stack([factor.cost for factor in factors])
        self.scale = target.new_empty(len(target), target.shape[1] // size, target.shape[2])
        self.zero = self.scale.clone()

    def __call__(self, start: int, base: Tensor, residual: Tensor) -> None:
        """Round the columns from `start` on, (B, n, rows), to the grids of their groups."""
        steps = slice(start, start + base.shape[1])
        if start % self.size == 0:
            self._begin(start, base, residual)
        own = self._feedback(steps, steps)
        grids = (self.scale, self.zero, 2**self.knobs.num_bits - 1)
        codes, rest, group = self.codes[:, steps], residual[:, steps], self.group[:, steps].contiguous()
        cuda_ops.round_columns(base, self.target[:, steps], own, grids, group, None, codes, rest)

    def _begin(self, start: int, base: Tensor, residual: Tensor) -> None:
        """Fit the grids of the groups that start at step `start` to their updated weights, (B, size, rows)."""
        steps = slice(start, start + self.size)
        updated = self.target[:, steps]
        if start:
            if base.shape[1] < self.size:  # a group of several blocks
                base = torch.empty_like(updated)
                for each, whole, factor, fixed in zip(base, updated, self.factors, residual, strict=True):
                    torch.addmm(whole, factor.feedback[steps, :start], fixed[:start], out=each)
            updated = cuda_ops.unrounded(base, updated, self._feedback(steps, steps))
        found = grid.search(updated, self.knobs.num_bits, self.knobs.symmetric, self.cost[:, steps, None])
        place = self.group[:, start, None, None].expand(-1, 1, updated.shape[2])
        self.scale.scatter_(1, place, found.scale[:, None])
        self.zero.scatter_(1, place, found.zero_point[:, None])

    def _feedback(self, rows: slice, columns: slice) -> Tensor:
        return torch.stack([factor.feedback[rows, columns] for factor in self.factors])

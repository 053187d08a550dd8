"""SparseGPT (Frantar & Alistarh 2023, arXiv 2301.00774, algorithm 1 with the n:m mask of section 3.3).

In each group of four columns, the mask keeps the two entries with the largest w^2 D: w after the feedback of earlier
columns, and D_j = 1 / [H^-1]_jj over the columns that remain: the paper's metric w^2 / [H^-1]_jj. Later columns
compensate for what was removed: w_j += sum_{i<j} F_ji (w_i - w'_i), w' the solution so far, F as in `hessian`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

import cuda_ops
from deepseek_compress.numerics import pattern
from deepseek_compress.numerics.hessian import factorize, solve
from deepseek_compress.numerics.types import Factor, Sparsifier, Statistics


class SparseGpt(Sparsifier, frozen=True):
    """Second-order pruning: choose the mask by its cost and update the weights that stay."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    paper: ClassVar[str] = "Frantar & Alistarh 2023, SparseGPT, arXiv 2301.00774"
    damping: float = Field(0.01, ge=0)  # share of the mean of the Hessian's diagonal

    def prepare(self, statistics: Statistics) -> Statistics:
        """Factor the Hessian once for all linears with this input."""
        return statistics._replace(factor=self._factor(statistics))

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` float32 (rows, columns); needs `statistics.hessian` or what `prepare` made of it."""
        pattern.check(weight.shape[1])
        factor = self._factor(statistics)
        target, feedback = weight.t().contiguous(), factor.feedback
        solution = torch.empty_like(target)

        def fix(start: int, base: Tensor, residual: Tensor) -> None:
            for j in range(start, start + len(base), 4):
                four = slice(j, j + 4)
                fed = base[j - start : j - start + 4].addmm_(feedback[four, start:j], residual[start:j])
                best = cuda_ops.unrounded(fed, target[four], feedback[four, four])
                keep = pattern.keep_two(best.square() * factor.cost[four, None])
                for i in range(j, j + 4):
                    updated = torch.addmv(fed[i - j], residual[j:i].t(), feedback[i, j:i])
                    torch.mul(updated, keep[i - j], out=solution[i])
                    torch.sub(target[i], solution[i], out=residual[i])

        solve(target, factor, fix, width=64)
        return solution.t().contiguous()

    def _factor(self, statistics: Statistics) -> Factor:
        key = ("natural", self.damping)
        if statistics.factor is not None and statistics.factor.key == key:
            return statistics.factor
        assert statistics.hessian is not None, "sparsegpt needs the Hessian: see `needs`"
        return factorize(
            statistics.hessian,
            torch.arange(len(statistics.hessian), device=statistics.hessian.device),
            self.damping,
            key,
        )

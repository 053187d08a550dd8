"""2:4 by coordinate descent over fours: masks and weights together, towards what the original model computes.

A linear is to give on its inputs x, now those of the sparse model, what the original gave on its own. That is the error
`E = tr((T - V) H (T - V)^T)` with H = sum x x^T and the target T of `gptaq.corrected`, over all V with two zeros in
every four. SparseGPT goes through the columns once, and never returns to a mask it chose before it knew what the later
columns would lose. Here its answer is only the start. With all other columns held, E as a function of four weights v
next to each other is `v^T A v - 2 b^T v`, A the 4 x 4 block of H on the diagonal and b = G + A v with G = H (T - V)^T.
Each of the six masks keeps two of them, whose best values are a 2 x 2 system: so the best mask of a four and its
weights are found exactly, and no step can raise E. A is the same for all rows, hence so are the six inverses; a sweep
over the columns costs `rows columns^2` multiply-adds, about as much as SparseGPT itself.

The problem is that of ALPS (Meng et al. 2024, arXiv 2406.07831), which relaxes the mask by ADMM; exact steps are those
of QuantEase (arXiv 2309.01885), there over the codes of a column.

Legend: columns-first tensors are (columns, rows).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepseek_compress.numerics.gptaq import corrected, validated
from deepseek_compress.numerics.hessian import damped, factorize
from deepseek_compress.numerics.sparsegpt import SparseGpt
from deepseek_compress.numerics.types import Statistics

PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))  # what a mask keeps of four
_WIDTH = 64  # columns whose gradient is kept up to date four by four; the others' by one product


class Reconstruct(SparseGpt, frozen=True):
    """SparseGPT, then sweeps over masks and weights together, towards the original model's outputs."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "cross_covariance", "half"})
    paper: ClassVar[str] = "Meng et al. 2024, ALPS, arXiv 2406.07831; Behdin et al. 2023, arXiv 2309.01885"
    sweeps: int = Field(6, ge=1)
    strength: float | None = Field(None, ge=0, le=1)  # of the correction, see `gptaq`; null: by cross-validation

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` float32 (rows, columns); without a cross-covariance it aims at `weight` itself."""
        assert statistics.hessian is not None, "reconstruct needs the Hessian: see `needs`"
        target = self._target(weight, statistics)
        start = super().__call__(target, statistics)
        hessian = damped(statistics.hessian, self.damping)
        return descend(target.t().contiguous(), start.t().contiguous(), hessian, self.sweeps).t().contiguous()

    def _target(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """Return the dense weight (rows, columns) whose outputs come closest to the original model's."""
        if statistics.cross_covariance is None or statistics.hessian is None:
            return weight
        damping, strength = self.damping, self.strength
        if strength is None:
            damping, strength = validated(weight, statistics, self.damping)
        if not strength:
            return weight
        order = torch.arange(weight.shape[1], device=weight.device)
        return corrected(weight, statistics, factorize(statistics.hessian, order, damping), strength)


def descend(target: Tensor, values: Tensor, hessian: Tensor, sweeps: int) -> Tensor:
    """`values` (columns, rows), 2:4, after `sweeps` over its fours towards `target` (columns, rows), in place.

    `hessian` (columns, columns) is damped: its diagonal is positive.
    """
    columns = len(target)
    best = _best(hessian)  # (fours, 24, 4)
    gradient = hessian @ (target - values)
    for _ in range(sweeps):
        for start in range(0, columns, _WIDTH):
            block = slice(start, min(start + _WIDTH, columns))
            before, pull, own = values[block].clone(), gradient[block].clone(), hessian[block, block]
            for j in range(0, len(pull), 4):
                four = slice(j, j + 4)
                v = values[start + j : start + j + 4]
                b = torch.addmm(pull[four], own[four, four], v)
                found = (best[(start + j) // 4] @ b).view(6, 4, -1)  # the weights that each mask would have
                mask = (found * b).sum(1).argmax(0)  # b^T v of a mask's best v is what it lowers E by
                new = found.gather(0, mask.expand(1, 4, -1))[0]
                pull.addmm_(own[:, four], v - new)
                v.copy_(new)
            gradient.addmm_(hessian[:, block], before.sub_(values[block]))
    return values


def _best(hessian: Tensor) -> Tensor:
    """(fours, 6 * 4, 4): times b, the best weights of each four under each mask, zeros among them."""
    fours = len(hessian) // 4
    blocks = hessian.view(fours, 4, fours, 4).diagonal(dim1=0, dim2=2).permute(2, 0, 1).double()
    found = torch.zeros(fours, 6, 4, 4, dtype=torch.float64, device=hessian.device)
    for mask, (a, b) in enumerate(PAIRS):
        p, q, r = blocks[:, a, a], blocks[:, a, b], blocks[:, b, b]
        inverse = 1 / (p * r - q * q)  # above zero: the Hessian is positive definite
        found[:, mask, a, a], found[:, mask, b, b] = r * inverse, p * inverse
        found[:, mask, a, b] = found[:, mask, b, a] = -q * inverse
    return found.view(fours, 24, 4).to(hessian.dtype)

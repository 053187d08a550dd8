"""The layer-wise error `tr((W - Q) H (W - Q)^T)` as a sum over columns, and the sequential solver built on it.

With H + damping = (I + F)^T D (I + F), F strictly lower triangular and D diagonal, the error is
`sum_j D_j |w_j + sum_{i<j} F_ji (w_i - q_i) - q_j|^2`. Fixing the columns in order, each one is rounded after the
feedback of the earlier ones: this is GPTQ and SparseGPT in the form of QuIP's LDLQ (Chee et al. 2023,
arXiv 2307.13304, theorem 6 proves them equal). It needs one Cholesky and no inverse, a third to a half of the
usual work, and D is exactly what a rounding error costs at its step.

Legend: columns-first tensors are (columns, rows); H is (columns, columns).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_compress.numerics.types import Factor

_NARROWEST = 192  # columns: below this a product no longer runs at full speed
_BLOCK = 64  # columns solved before their errors are fed forward in one product


def gram(x: Tensor) -> Tensor:
    """`x^T x` of float32 `x` (tokens, columns), exactly symmetric, at two thirds of the full product's work."""
    columns = x.shape[1]
    width = max(_NARROWEST, columns // 8)
    result = torch.empty((columns, columns), dtype=x.dtype, device=x.device)
    for start in range(0, columns, width):
        stop = min(start + width, columns)
        torch.mm(x[:, start:stop].t(), x[:, start:], out=result[start:stop, start:])
    upper = result.triu_()
    return upper + upper.triu(1).t()


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` with `damping` times the mean of its diagonal added to the diagonal.

    A column whose input is always zero (or that no token reached) keeps the damping alone: it is rounded to
    nearest and takes part in no feedback.
    """
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    level = mean if bool(mean > 0) else torch.ones_like(mean)
    return hessian + torch.diag(torch.full_like(diagonal, 1.0) * damping * level)


def factorize(hessian: Tensor, order: Tensor, damping: float, key: tuple[object, ...] = ()) -> Factor:
    """The triangular factor of the damped `hessian` (columns, columns) with its columns in `order` (columns,).

    The damping grows tenfold until the factor exists: few tokens, or a type too short, make H indefinite.
    """
    ordered = hessian[order][:, order]
    while True:
        # H = R R^T with R upper triangular is the ordinary Cholesky of the matrix read backwards.
        lower, failed = torch.linalg.cholesky_ex(damped(ordered, damping).flip(0, 1))
        if int(failed) == 0 and bool(lower.isfinite().all()):
            break
        damping = max(damping * 10, 1e-6)
    root = lower.t().flip(0, 1)  # R^T, rows contiguous: row j is read at step j
    del lower, ordered
    diagonal = root.diagonal().clone()
    return Factor(order, root.div_(diagonal[:, None]).tril_(-1), diagonal.square(), key)


def divide(right: Tensor, factor: Factor) -> Tensor:
    """`right (H + damping)^-1` for `right` (rows, columns), columns in their natural order."""
    lower = factor.feedback  # its unit diagonal is implied
    ordered = right.t()[factor.order]
    ordered = torch.linalg.solve_triangular(lower.t(), ordered, upper=True, unitriangular=True)
    ordered = torch.linalg.solve_triangular(lower, ordered / factor.cost[:, None], upper=False, unitriangular=True)
    result = torch.empty_like(ordered)
    result[factor.order] = ordered
    return result.t()


def solve(
    target: Tensor,
    factor: Factor,
    choose: Callable[[int, Tensor], Tensor],
    begin: Callable[[int, Tensor], None] | None = None,
    run: int = 1,
) -> Tensor:
    """Fix the columns one after the other, each after the feedback of those before it.

    `target` (columns, rows) in solving order. `choose(j, updated)` gives the value of column `j` from its updated
    weights (rows,). `begin(j, updated)` sees, before each run of `run` columns, the weights (run, rows) that would
    be best if nothing more were rounded. Returns the chosen values (columns, rows) in solving order.
    """
    columns = len(target)
    feedback, solution, residual = factor.feedback, torch.empty_like(target), torch.zeros_like(target)
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        base = torch.addmm(target[start:stop], feedback[start:stop, :start], residual[:start])
        for j in range(start, stop):
            if begin is not None and j % run == 0:
                since, known = (
                    (start, base[j - start : j - start + run]) if j + run <= stop else (0, target[j : j + run])
                )
                fed = torch.addmm(known, feedback[j : j + run, since:j], residual[since:j])
                begin(j, _unrounded(target[j : j + run], fed, feedback[j : j + run, j : j + run]))
            updated = torch.addmv(base[j - start], residual[start:j].t(), feedback[j, start:j])
            solution[j] = choose(j, updated)
            torch.sub(target[j], solution[j], out=residual[j])
    return solution


def _unrounded(target: Tensor, fed: Tensor, feedback: Tensor) -> Tensor:
    """The values of a run (run, rows) that feed each other without rounding: `v = fed + F (target - v)`."""
    moved: Tensor = torch.linalg.solve_triangular(feedback, target - fed, upper=False, unitriangular=True)
    return target - moved


def layer_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """`tr((W - Q) H (W - Q)^T)`: the squared error of the linear's outputs over the calibration tokens."""
    difference = (weight - approximation).float()
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))

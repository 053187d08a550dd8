"""The layer-wise error `tr((W - Q) H (W - Q)^T)` as a sum over columns, and the sequential solver built on it.

With H + damping = (I + F)^T D (I + F), F strictly lower triangular and D diagonal, the error is
`sum_j D_j |w_j + sum_{i<j} F_ji (w_i - q_i) - q_j|^2`. Fixing the columns in order, each one is rounded after the
feedback of the earlier ones: this is GPTQ and SparseGPT in the form of QuIP's LDLQ (Chee et al. 2023,
arXiv 2307.13304, theorem 6 proves them equal). It needs one Cholesky and no inverse, a third to a half of the
usual work, and D is exactly what a rounding error costs at its step.

Legend: columns-first tensors are (columns, rows); H is (columns, columns).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.numerics.types import Factor

_NARROWEST = 192  # columns: below this a product no longer runs at full speed
CHOLESKY = 256  # columns of a panel of the factor
WIDTH = 128  # columns that are fixed at a time
_GATHERED = 32  # rows that are put in order at a time
_PANEL = 512  # columns whose feedback from all earlier ones is one product
_TRIES = 16  # dampings, each ten times the last: far beyond what makes any finite symmetric matrix definite


class Unsolvable(DscError):
    """A Hessian that has no factor, or none in float32. Whoever knows the linear's name adds it."""


def add_gram(total: Tensor | None, x: Tensor) -> Tensor:
    """`total` + `x^T x` of float32 `x` (tokens, columns) on and above the diagonal, in place.

    What stands below waits for `mirror`: so it is little more than half the full product's work. On a GPU of `parts`.
    """
    columns = x.shape[1]
    if total is None:
        total = torch.zeros((columns, columns), dtype=x.dtype, device=x.device)
    if in_parts(x):
        left, right = parts(x)
        for start, stop in _panels(columns):
            total[start:stop, start:] += _product(left[:, start:stop].t(), right[:, start:])
        return total
    for start, stop in _panels(columns):
        total[start:stop, start:].addmm_(x[:, start:stop].t(), x[:, start:])
    return total


def in_parts(x: Tensor) -> bool:
    """Whether products of BF16 are worth it: where tensor cores compute them."""
    return x.is_cuda


def parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """BF16 (3 tokens, columns) L and R whose product L^T R is x^T x.

    x = h + l + r, h and l its nearest BF16 and that of the rest: L = [h; h; l], R = [h; l; h]. A product of two BF16
    numbers is exact in float32, where they are summed. What is left out, l^T l and the products with r, is less than
    2^-15 of |x|^T |x|; a tensor core takes about a fifth of the time of float32 products for it.
    """
    high = x.bfloat16()
    low = (x - high.float()).bfloat16()
    return torch.cat((high, high, low)), torch.cat((high, low, high))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Float32 product of BF16 matrices, whose elements are nowhere rounded to BF16."""
    if left.is_cuda:
        made: Tensor = torch.ops.aten.mm.dtype(left, right, torch.float32)
        return made
    return left.float() @ right.float()


def mirror(total: Tensor) -> Tensor:
    """Make `total` (columns, columns) symmetric by what stands above its diagonal, in place."""
    panels = list(_panels(len(total)))
    for start, stop in panels:
        own = total[start:stop, start:stop].triu_()
        own += own.triu(1).t()
        for left, right in panels:
            if left > start:
                total[left:right, start:stop] = total[start:stop, left:right].t()
    return total


def _panels(columns: int) -> Iterator[tuple[int, int]]:
    width = max(_NARROWEST, -(-columns // 16))
    return ((start, min(start + width, columns)) for start in range(0, columns, width))


def damped(hessian: Tensor, damping: float) -> Tensor:
    """`hessian` with `damping` times the mean of its diagonal added to the diagonal.

    A column whose input is always zero (or that no token reached) keeps the damping alone: it is rounded to
    nearest and takes part in no feedback.
    """
    return damp(hessian.clone(), damping)


def damp(hessian: Tensor, damping: float) -> Tensor:
    """`damped`, in place."""
    diagonal = hessian.diagonal()
    mean = diagonal.mean()
    diagonal += damping * torch.where(mean > 0, mean, 1.0)
    return hessian


def factorize(hessian: Tensor, order: Tensor, damping: float, key: tuple[object, ...] = ()) -> Factor:
    """Return the triangular factor of the damped `hessian` (columns, columns) with its columns in `order` (columns,).

    The damping grows tenfold until the factor exists: few tokens, or a type too short, make H indefinite. Raises
    `Unsolvable` where it never does. Three matrices of the size of `hessian` are held at the peak, it and the factor
    among them.
    """
    columns, backwards = len(hessian), order.flip(0)
    matrix = torch.empty_like(hessian)
    for _ in range(_TRIES):
        for start in range(0, columns, _GATHERED):  # a few rows at a time stay in the cache
            rows = hessian.index_select(0, backwards[start : start + _GATHERED])
            torch.index_select(rows, 1, backwards, out=matrix[start : start + _GATHERED])
        # H = R R^T with R upper triangular is the ordinary Cholesky of the matrix read backwards.
        if _cholesky(damp(matrix, damping)):
            break
        damping = max(damping * 10, 1e-6)
    else:
        raise _unsolvable(hessian)
    return factor_of(matrix, order, key)


def factor_of(matrix: Tensor, order: Tensor, key: tuple[object, ...]) -> Factor:
    """Return the factor from R^T on and above the diagonal of `matrix` (columns, columns), which is read backwards."""
    columns = len(matrix)
    diagonal = matrix.diagonal().flip(0)
    feedback = torch.empty_like(matrix)
    for start in range(0, columns, _GATHERED):  # row j of R^T, from its diagonal on backwards, is read at step j
        rows = matrix[max(0, columns - start - _GATHERED) : columns - start].flip(0, 1)
        part = diagonal[start : start + _GATHERED, None]
        torch.div(rows, part, out=feedback[start : start + _GATHERED]).tril_(start - 1)
    return Factor(order, feedback, diagonal.square(), key)


def _unsolvable(hessian: Tensor) -> Unsolvable:
    bad = int((~hessian.diagonal().isfinite()).sum())  # an input that fails reaches its own square first
    if bad:
        what = f"the Hessian is NaN or infinite in {bad} of {len(hessian)} columns"
    elif not bool(hessian.diagonal().mean().isfinite()):
        what = "the diagonal of the Hessian sums to more than float32 holds"
    else:
        what = f"the Hessian has no Cholesky factor with any of {_TRIES} dampings"
    return Unsolvable(what, "check the model for weights that are far too large, and the calibration text")


def _cholesky(matrix: Tensor) -> bool:
    """Replace what stands on and above the diagonal by U of `matrix = U^T U`; False where there is none.

    In panels, so that nearly all of it is products, which run at twice the speed of the library's own routine.
    """
    columns, failures = len(matrix), []
    for start in range(0, columns, CHOLESKY):
        stop = min(start + CHOLESKY, columns)
        above = matrix[:start, start:]
        rows = matrix[start:stop, start:].addmm_(above[:, : stop - start].t(), above, alpha=-1)
        own, failed = torch.linalg.cholesky_ex(rows[:, : stop - start], upper=True)
        failures.append(failed.bool() | ~own.diagonal().isfinite().all())  # what is not finite reaches the diagonal
        if matrix.is_cpu and bool(failures[-1]):
            return False
        rows[:, : stop - start] = own
        if stop < columns:
            rows[:, stop - start :] = torch.linalg.solve_triangular(own.t(), rows[:, stop - start :], upper=False)
    return not bool(torch.stack(failures).any())  # read once: a GPU is waited for


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
    fix: Callable[[int, Tensor, Tensor], None],
    width: int = WIDTH,
    cut: int | None = None,
) -> Tensor:
    """Fix the columns one block after the other, each after the feedback of those before it.

    `target` (columns, rows) in solving order. `fix(start, base, residual)` decides the columns from `start` on: `base`
    (n, rows), its own to use up, is their target after the feedback of all columns before `start`; it fills rows
    `start` to `start + n` of `residual` (columns, rows) with target - value. Blocks have `width` columns, fewer where a
    multiple of `cut` ends them. Returns `residual`.
    """
    columns, feedback = len(target), factor.feedback
    residual = torch.empty_like(target)
    panel = target[:0]
    first = stop = 0  # the panel's columns
    for start, end in blocks(columns, width, cut or columns):
        if end > stop:
            first, stop = start, panel_end(start, end, columns, width)
            panel = torch.addmm(target[first:stop], feedback[first:stop, :first], residual[:first])
        base = panel[start - first : end - first]
        if start > first:
            base.addmm_(feedback[start:end, first:start], residual[first:start])
        fix(start, base, residual)
    return residual


def panel_end(start: int, end: int, columns: int, width: int = WIDTH) -> int:
    """Where the columns end whose feedback from all before `start`, with that of the block to `end`, is one product."""
    return min(columns, max(end, start + _PANEL // width * width))


def blocks(columns: int, width: int, cut: int) -> Iterator[tuple[int, int]]:
    """Blocks of `width` columns, fewer where a multiple of `cut` ends them."""
    start = 0
    while start < columns:
        stop = min(start + width, (start // cut + 1) * cut, columns)
        yield start, stop
        start = stop


def layer_error(weight: Tensor, approximation: Tensor, hessian: Tensor) -> float:
    """`tr((W - Q) H (W - Q)^T)`: the squared error of the linear's outputs over the calibration tokens."""
    difference = (weight - approximation).float()
    return float(((difference @ hessian) * difference).sum(dtype=torch.float64))

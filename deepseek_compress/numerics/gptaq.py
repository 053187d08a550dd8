"""GPTAQ (Li et al. 2025, arXiv 2504.02692): calibrate against what the original model would have computed.

The compressed model feeds a linear X where the original fed X*. The output to match is W X*, so the error is
`|W X* - Q X|^2 = tr((W' - Q) H (W' - Q)^T) + const`, `H = X X^T`, `W' = W + W (X* - X) X^T H^-1`. The paper folds the
second term into each column's update; moving the target first and then running GPTQ is the same least squares,
solved exactly. A linear whose output is added to the residual stream can also make up for what the stream itself has
lost, h* - h: its target is W X* + h* - h, which adds `(h* - h) X^T H^-1` to W'. That is not in the paper.

`strength` below 1 moves the target part of the way: what some thousand tokens say is partly their own noise. Without
one it is found for each linear by cross-validation: a correction C of the target from one half of the tokens lowers the
other half's error by `2 s tr(C M^T) - s^2 tr(C H C^T)`, M the correlation `(W (X* - X) + h* - h) X^T` of that half, so
the best s is a ratio of two sums over both halves. So is the damping of H, the one of `DAMPINGS` that lowers it most.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepseek_compress.numerics import pattern
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.hessian import divide, factorize
from deepseek_compress.numerics.types import Factor, Quantized, Statistics

DAMPINGS = (0.05, 0.5)  # shares of the mean of the diagonal that are tried besides the solver's own


class Gptaq(Gptq, frozen=True):
    """GPTQ towards the original model's outputs, correcting what earlier layers lost."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "cross_covariance", "half"})
    paper: ClassVar[str] = "Li et al. 2025, GPTAQ, arXiv 2504.02692"
    strength: float | None = Field(None, ge=0, le=1)  # null: by cross-validation
    correction_damping: float | None = Field(None, ge=0)  # as `damping`, of the correction alone; null: with `strength`
    enough: int | None = Field(None, ge=1)  # tokens a linear needs: text beyond that is left out; null: all is used
    largest: int | None = Field(None, ge=1)  # weights of a model: a larger one is not corrected; null: any is

    def uncorrected(self) -> Gptq:
        """GPTQ with the same knobs: without a second model, at half the time and a third of the memory."""
        return Gptq.model_validate(self.model_dump(include=set(Gptq.model_fields)))

    def decided(self, weight: Tensor, statistics: Statistics) -> Gptaq:
        """Strength and damping of the correction; what is given stays."""
        if self.strength is not None:
            return self
        damping, strength = validated(weight, statistics, self.damping)
        return self.model_copy(update={"strength": strength, "correction_damping": damping})

    def __call__(self, weight: Tensor, statistics: Statistics) -> Quantized:
        """`weight` float32 (rows, columns); needs `statistics.hessian`; without a cross-covariance this is GPTQ."""
        prepared, knobs = self.prepare(statistics), self.decided(weight, statistics)
        if not knobs.strength or statistics.cross_covariance is None:
            return super().__call__(weight, prepared)
        assert prepared.factor is not None
        assert statistics.hessian is not None
        factor, damping = prepared.factor, knobs.correction_damping
        if damping is not None and damping != self.damping:
            factor = factorize(statistics.hessian, factor.order, damping)
        return super().__call__(corrected(weight, statistics, factor, knobs.strength), prepared)


def missing(weight: Tensor, statistics: Statistics) -> Tensor:
    """M (rows, columns): what the outputs lack, times the inputs, summed over the tokens."""
    assert statistics.cross_covariance is not None
    found = weight @ statistics.cross_covariance
    return found if statistics.residual_covariance is None else found + statistics.residual_covariance


def corrected(weight: Tensor, statistics: Statistics, factor: Factor, strength: float) -> Tensor:
    """Return the weight (rows, columns) whose outputs on the compressed model's inputs come closest to the original's.

    `factor` is that of the Hessian. Zeros of a 2:4 weight stay zeros (the rest does not make up for it).
    """
    if statistics.cross_covariance is None:
        return weight
    moved = divide(missing(weight, statistics), factor)
    if pattern.holds(weight):
        moved = moved.masked_fill(weight == 0, 0)
    return weight + strength * moved


def validated(weight: Tensor, statistics: Statistics, damping: float) -> tuple[float, float]:
    """(damping, strength) of the correction that lowers held-back tokens' error most; without halves (damping, 0).

    Each half of the tokens judges the correction that the other gives.
    """
    half, whole = statistics.half, statistics.hessian
    if half is None or half.hessian is None or half.cross_covariance is None or whole is None:
        return damping, 0.0
    first = (half.hessian, missing(weight, half))
    second = (whole - first[0], missing(weight, statistics) - first[1])
    best = (0.0, damping, 0.0)  # what is gained, damping, strength
    order = torch.arange(len(whole), device=whole.device)
    dampings = (damping, *(d for d in DAMPINGS if d > damping))
    sums = torch.zeros(len(dampings), 2, dtype=torch.float64, device=whole.device)
    for row, tried in zip(sums, dampings, strict=True):
        for (h, m), (other_h, other_m) in ((first, second), (second, first)):
            c = divide(m, factorize(h, order, tried))
            row[0] += (c * other_m).sum(dtype=torch.float64)
            row[1] += ((c @ other_h) * c).sum(dtype=torch.float64)
    for tried, (gained, energy) in zip(dampings, sums.tolist(), strict=True):
        strength = min(1.0, max(0.0, gained / energy)) if energy > 0 else 0.0
        best = max(best, (2 * strength * gained - strength**2 * energy, tried, strength))
    return best[1], best[2]

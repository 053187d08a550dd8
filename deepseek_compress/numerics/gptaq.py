"""GPTAQ (Li et al. 2025, arXiv 2504.02692): calibrate against what the original model would have computed.

The compressed model feeds a linear X where the original fed X*. The output to match is W X*, so the error is
`|W X* - Q X|^2 = tr((W' - Q) H (W' - Q)^T) + const`, `H = X X^T`, `W' = W + W (X* - X) X^T H^-1`. The paper folds the
second term into each column's update; moving the target first and then running GPTQ is the same least squares,
solved exactly. A linear whose output is added to the residual stream can also make up for what the stream itself has
lost, h* - h: its target is W X* + h* - h, which adds `(h* - h) X^T H^-1` to W'. That is not in the paper.

`strength` below 1 moves the target part of the way: what some thousand tokens say is partly their own noise.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from deepseek_compress.numerics import pattern
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.hessian import divide
from deepseek_compress.numerics.types import Factor, Quantized, Statistics


class Gptaq(Gptq, frozen=True):
    """GPTQ towards the original model's outputs, correcting what earlier layers lost."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "cross_covariance"})
    paper: ClassVar[str] = "Li et al. 2025, GPTAQ, arXiv 2504.02692"
    strength: float = Field(0.5, ge=0, le=1)

    def __call__(self, weight: Tensor, statistics: Statistics) -> Quantized:
        """`weight` float32 (rows, columns); needs `statistics.hessian`; without a cross-covariance this is GPTQ."""
        prepared = self.prepare(statistics)
        assert prepared.factor is not None
        return super().__call__(corrected(weight, prepared, prepared.factor, self.strength), prepared)


def corrected(weight: Tensor, statistics: Statistics, factor: Factor, strength: float) -> Tensor:
    """The weight (rows, columns) whose outputs on the compressed model's inputs come closest to the original's.

    `factor` is that of the Hessian. Zeros of a 2:4 weight stay zeros (the rest does not make up for it).
    """
    if statistics.cross_covariance is None:
        return weight
    missing = weight @ statistics.cross_covariance
    if statistics.residual_covariance is not None:
        missing = missing + statistics.residual_covariance
    moved = divide(missing, factor)
    if pattern.holds(weight):
        moved = moved.masked_fill(weight == 0, 0)
    return weight + strength * moved

"""GPTAQ (Li et al. 2025, arXiv 2504.02692): calibrate against what the original model would have computed.

The compressed model feeds a linear X where the original fed X*. The output to match is W X*, so the error is
`|W X* - Q X|^2 = tr((W' - Q) H (W' - Q)^T) + const`, `H = X X^T`, `W' = W + W (X* - X) X^T H^-1`. The paper folds the
second term into each column's update; moving the target first and then running GPTQ is the same least squares,
solved exactly. `strength` below 1 moves the target part of the way: what earlier blocks lost cannot be read off few
tokens without noise.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepseek_compress.numerics import pattern
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.hessian import damped
from deepseek_compress.numerics.types import Quantized, Statistics


class Gptaq(Gptq, frozen=True):
    """GPTQ towards the original model's outputs, correcting what earlier layers lost."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "drift"})
    paper: ClassVar[str] = "Li et al. 2025, GPTAQ, arXiv 2504.02692"
    strength: float = Field(0.5, ge=0, le=1)

    def __call__(self, weight: Tensor, statistics: Statistics) -> Quantized:
        """`weight` float32 (rows, columns); needs `statistics.hessian` and `statistics.drift`."""
        return super().__call__(corrected(weight, statistics, self.strength, self.damping), statistics)


def corrected(weight: Tensor, statistics: Statistics, strength: float, damping: float) -> Tensor:
    """The weight (rows, columns) whose outputs on the compressed model's inputs come closest to the original's.

    Zeros of a 2:4 weight stay zeros (the rest does not make up for it).
    """
    assert statistics.hessian is not None, "needs the Hessian"
    assert statistics.drift is not None, "needs the drift"
    moved: Tensor = torch.linalg.solve(damped(statistics.hessian, damping), (weight @ statistics.drift).t()).t()
    if pattern.holds(weight):
        moved = moved.masked_fill(weight == 0, 0)
    return weight + strength * moved

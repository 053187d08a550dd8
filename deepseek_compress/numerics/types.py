"""Interface of every solver: statistics of a linear's input in, quantised weight out."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor


class Quantized(NamedTuple):
    """A weight on its grid: `weight ~ (codes - zero_point) * scale`, group `j // group_size` for column `j`.

    `scale` already has the value it is stored with (rounded to the stored type, held as float32).
    """

    codes: Tensor  # uint8 (rows, columns), 0 .. 2**num_bits - 1, unpacked
    scale: Tensor  # float32 (rows, groups), values exactly representable in the stored type (BF16 by default)
    zero_point: Tensor  # uint8 (rows, groups), integers 0 .. 2**num_bits - 1
    num_bits: int = 4
    symmetric: bool = False  # symmetric: zero_point is 2**(num_bits - 1) everywhere and is not stored

    @property
    def group_size(self) -> int:
        """Columns that share one scale."""
        return self.codes.shape[1] // self.scale.shape[1]

    def to(self, device: torch.device | str) -> Quantized:
        """Return the same on another device."""
        parts = (self.codes.to(device), self.scale.to(device), self.zero_point.to(device))
        return Quantized(*parts, self.num_bits, self.symmetric)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, columns), computed in float32 and rounded once to `dtype`."""
        rows, columns = self.codes.shape
        codes = self.codes.view(rows, self.scale.shape[1], -1).float()
        weight = (codes - self.zero_point.float().unsqueeze(-1)) * self.scale.unsqueeze(-1)
        return weight.reshape(rows, columns).to(dtype)


class Factor(NamedTuple):
    """`H[order][:, order] + damping = (I + feedback)^T diag(cost) (I + feedback)`, see `hessian.factorize`."""

    order: Tensor  # int64 (columns,): the column solved at each step
    feedback: Tensor  # float32 (columns, columns), strictly lower, in solving order: row j feeds step j
    cost: Tensor  # float32 (columns,), in solving order: what a squared rounding error of 1 costs at that step
    key: tuple[object, ...]  # the knobs it was made with; a solver with other knobs makes its own


class Statistics(NamedTuple):
    """Calibration statistics of one linear's input. Fields that were not asked for are None.

    `factor` is filled by `WeightQuantizer.prepare`, once for all linears that share the input.
    """

    tokens: int = 0
    hessian: Tensor | None = None  # float32 (columns, columns): sum over tokens of x x^T, not yet divided by tokens
    input_absmax: Tensor | None = None  # float32 (columns,): largest |x| per channel
    input_absmean: Tensor | None = None  # float32 (columns,): mean |x| per channel
    # Of a second model's states x*, h* (h: what the linear's output is added to):
    cross_covariance: Tensor | None = None  # float32 (columns, columns): sum of (x* - x) x^T
    residual_covariance: Tensor | None = None  # float32 (rows, columns): sum of (h* - h) x^T
    half: Statistics | None = None  # the same sums over one half of the tokens alone, for a look at held-back ones
    factor: Factor | None = None


class WeightQuantizer(BaseModel, frozen=True, extra="forbid"):
    """Pure: the same weight, statistics and knobs give the same bits. Fields are the knobs of a recipe."""

    needs: ClassVar[frozenset[str]] = frozenset()  # names of Statistics fields
    loads: ClassVar[int] = 0  # bytes of libraries that only it imports, in each process that solves
    paper: ClassVar[str] = ""
    num_bits: int = Field(4, ge=2, le=8)
    group_size: int | None = Field(None, gt=0)  # None: the stage chooses (largest of 128, 64, 32 that fits)
    symmetric: bool = False

    def prepare(self, statistics: Statistics) -> Statistics:
        """Return the part of the work that linears with one input share: solve each of them with what this returns."""
        return statistics

    def decided(self, weight: Tensor, statistics: Statistics) -> WeightQuantizer:
        """Return the method with the knobs that are left to it decided for this `weight`, from what `prepare` gave."""
        return self

    def __call__(self, weight: Tensor, statistics: Statistics) -> Quantized:
        """`weight` float32 (rows, columns), not modified."""
        raise NotImplementedError


class Sparsifier(BaseModel, frozen=True, extra="forbid"):
    """Chooses which weights become zero and, where it can, corrects the others."""

    needs: ClassVar[frozenset[str]] = frozenset()
    paper: ClassVar[str] = ""
    pattern: str = Field("2:4", pattern="^2:4$")

    def prepare(self, statistics: Statistics) -> Statistics:
        """Return the part of the work that linears with one input share."""
        return statistics

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """float32 (rows, columns) -> float32 (rows, columns) with exact zeros by the pattern."""
        raise NotImplementedError

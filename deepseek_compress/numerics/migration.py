"""Scales of channels that make activations easier and weights harder to round: X W^T = (X / s) (s W)^T.

SmoothQuant (Xiao et al. 2022, arXiv 2211.10438, equation 4) takes them from largest values,

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)

AWQ (arXiv 2306.00978, equations 4 and 5) from mean ones, s_j = mean|X_j|^alpha with the alpha whose rounded weights
give the least error. Whoever applies them divides what makes the channels (`models.folds`).

A scale that is a power of two moves without any rounding, also between 16-bit tensors (`power_of_two`); others serve
a little better (SmolLM2-135M, W8A8: see reports/LOG.md) where the weights are rounded to few bits anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from deepseek_compress.numerics import awq
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Statistics

SMALLEST, LARGEST = 2.0**-16, 2.0**16  # a scale
_WEIGHT = 1e-8


class Migration(BaseModel, frozen=True, extra="forbid"):
    """Finds scales. Fields are the knobs of a recipe."""

    needs: ClassVar[frozenset[str]] = frozenset()  # names of Statistics fields
    streams: ClassVar[bool] = False  # `kept` is small, so that all experts of a block fit
    loads: ClassVar[int] = 0  # bytes of libraries that only it imports
    paper: ClassVar[str] = ""
    samples: int | None = Field(None, ge=1)  # of the calibration text that are looked at, the first ones; null: all

    def kept(self, weight: Tensor) -> Tensor:
        """Return what `scales` has to know of a weight (rows, columns) that reads the channels: (some, columns)."""
        return weight

    def scales(self, weights: Sequence[Tensor], statistics: Statistics) -> Tensor:
        """float32 (columns,), positive; `weights` is what was `kept` of each weight that reads the channels."""
        raise NotImplementedError


def power_of_two(scales: Tensor) -> Tensor:
    """Return the nearest powers of two."""
    return torch.exp2(scales.log2().round())


class SmoothQuant(Migration, frozen=True):
    """Largest values of inputs and weights are brought together."""

    needs: ClassVar[frozenset[str]] = frozenset({"input_absmax"})
    streams: ClassVar[bool] = True
    paper: ClassVar[str] = "Xiao et al. 2022, SmoothQuant, arXiv 2211.10438"
    alpha: float = Field(0.5, ge=0, le=1)  # share of the difficulty that goes to the weights

    def kept(self, weight: Tensor) -> Tensor:
        """Return the largest value of each column, (1, columns)."""
        return weight.abs().amax(0, keepdim=True)

    def scales(self, weights: Sequence[Tensor], statistics: Statistics) -> Tensor:
        """Needs `statistics.input_absmax`."""
        assert statistics.input_absmax is not None, "smoothquant needs the largest inputs"
        largest = torch.cat(list(weights)).abs().amax(0)
        found = statistics.input_absmax.pow(self.alpha) / largest.clamp(min=_WEIGHT).pow(1 - self.alpha)
        found = found.clamp(SMALLEST, LARGEST)
        return torch.where(statistics.input_absmax > 0, found, torch.ones_like(found))


class AwqScales(Migration, frozen=True):
    """Channels with large inputs get finer steps, as far as the rounded weights gain by it."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "input_absmean"})
    paper: ClassVar[str] = "Lin et al. 2023, AWQ, arXiv 2306.00978"
    num_bits: int = Field(4, ge=2, le=8)  # of the rounding that is tried
    group_size: int | None = Field(None, gt=0)
    symmetric: bool = False
    steps: int = Field(20, ge=1)

    def scales(self, weights: Sequence[Tensor], statistics: Statistics) -> Tensor:
        """Needs `statistics.hessian` and `input_absmean`."""
        nearest = Rtn(num_bits=self.num_bits, group_size=self.group_size, symmetric=self.symmetric)
        return awq.migration(list(weights), statistics, nearest, self.steps).clamp(SMALLEST, LARGEST)

"""2:4 by magnitude: of each four neighbouring weights, the two largest stay as they are."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from deepseek_compress.numerics import pattern
from deepseek_compress.numerics.types import Sparsifier, Statistics


class Magnitude(Sparsifier, frozen=True):
    """Keep the two largest of each four weights, data-free."""

    paper: ClassVar[str] = "Mishra et al. 2021, Accelerating Sparse Deep Neural Networks, arXiv 2104.08378"

    def __call__(self, weight: Tensor, statistics: Statistics) -> Tensor:
        """`weight` float32 (rows, columns); `statistics` is not read."""
        rows, columns = weight.shape
        pattern.check(columns)
        fours = weight.t().reshape(columns // 4, 4, rows)
        kept = torch.where(pattern.keep_two(fours.abs()), fours, torch.zeros_like(fours))
        return kept.reshape(columns, rows).t().contiguous()

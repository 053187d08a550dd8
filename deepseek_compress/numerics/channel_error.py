"""The error of a hidden state, channel by channel, and how much of it lies in channels that stand out.

With h the reference's and h' the model's state over all tokens n, by channel c:

    size_c = sum_n h_nc^2,  apart_c = sum_n (h'_nc - h_nc)^2,  error = sqrt(sum apart / sum size)

A channel stands out where the root of its size is more than `STANDS_OUT` times the median's: the outlier channels of
LLM.int8() (arXiv 2208.07339, section 3.1), found by a ratio since a fixed magnitude fits no two models.
"""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

STANDS_OUT = 6.0


class Outliers(TypedDict):
    """Channels of a block's output that stand out in the reference."""

    channels: int
    size: float  # their share of the state's squares
    error: float  # their share of the squared error; 0 where there is none


class ChannelError:
    """Sums of squares by channel, float64."""

    def __init__(self, channels: int) -> None:
        self.whole = torch.zeros(channels, dtype=torch.float64)
        self.apart = torch.zeros(channels, dtype=torch.float64)

    def add(self, expected: Tensor, given: Tensor) -> None:
        """Add the states of some tokens, (..., channels) of the reference and of the model."""
        expected = expected.double().flatten(0, -2)
        self.whole += expected.square().sum(0).cpu()
        self.apart += (given.double().flatten(0, -2) - expected).square().sum(0).cpu()

    def relative(self) -> float | None:
        """||h - h'|| / ||h||; None where the reference is zero."""
        whole = float(self.whole.sum())
        return (float(self.apart.sum()) / whole) ** 0.5 if whole else None

    def outliers(self) -> Outliers | None:
        """Return what stands out in the reference; None where it is zero."""
        whole, apart = float(self.whole.sum()), float(self.apart.sum())
        if not whole:
            return None
        out = self.whole > STANDS_OUT**2 * self.whole.median()
        return {
            "channels": int(out.sum()),
            "size": float(self.whole[out].sum()) / whole,
            "error": float(self.apart[out].sum()) / apart if apart else 0.0,
        }

"""Range estimators of static activations: how far the grid of an input reaches, from what calibration saw of it.

An `Observer` takes batches of one linear's input and keeps the smallest and the largest value, or their moving
averages, and, where the estimator asks, a histogram of |x| in BINS bins. The width of a bin is a power of two and
doubles when a larger value comes, which adds neighbouring bins: memory is bounded, no count is ever split, and the
histogram is the same in whatever batches the values come.

An estimator gives a threshold T: values beyond it are clipped. The grid covers [-T, T] where it is symmetric, else
what of that was seen, widened to include 0. Its step is then known, and zero is on it, so rounding errs alike at x and
at -x: the histogram of magnitudes is all that an error needs.

NVIDIA ModelOpt's histogram calibrators are the reference by value in the tests. They are not used: their histogram
grows without bound with the range, its bins depend on the first batch, they know symmetric grids alone, try every bin
in Python loops, and 0.47's mean square error rounds with the bits as a bias.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor

BINS = 8192  # of a histogram, at least half of them below the largest magnitude
_SMALLEST = -126  # exponent: of what a bin is wide at least
_CHUNK = 1 << 20  # values counted at a time
_STEPS = 16  # thresholds tried for each halving
_HALVINGS = 6  # and how often the range is halved


class Seen(NamedTuple):
    """Statistics of an input."""

    low: float  # smallest value, or the moving average of each batch's
    high: float  # largest
    counts: Tensor | None  # int64 (BINS,): of |x| in [i, i + 1) * width
    width: float

    @property
    def largest(self) -> float:
        """Magnitude."""
        return max(-self.low, self.high)

    def step(self, threshold: float, num_bits: int, symmetric: bool) -> float:
        """Of the grid that reaches to `threshold`."""
        low, high = self.clipped(threshold, symmetric)
        return max(-low, high) / ((1 << (num_bits - 1)) - 1) if symmetric else (high - low) / ((1 << num_bits) - 1)

    def clipped(self, threshold: float, symmetric: bool) -> tuple[float, float]:
        """Return the ends of that grid; 0 lies between them."""
        if symmetric:
            return -threshold, threshold
        return max(min(self.low, 0.0), -threshold), min(max(self.high, 0.0), threshold)


class Observer:
    """Sums up the input of one linear. `share`: the weight of a new batch where averages are kept, not extremes."""

    def __init__(self, counting: bool, share: float | None = None) -> None:
        self.tokens = 0
        self._share = share
        self._low, self._high = math.inf, -math.inf
        self._counts = torch.zeros(BINS, dtype=torch.int64) if counting else None
        self._exponent = _SMALLEST  # of the width

    def add(self, x: Tensor) -> None:
        """Take in a batch (..., columns). NaN and infinity make the range infinite."""
        if not x.numel():
            return
        low, high = (float(end) for end in torch.aminmax(x))
        finite = math.isfinite(low) and math.isfinite(high)
        if not finite:
            low, high = -math.inf, math.inf
        if self._share is None or not self.tokens:
            self._low, self._high = min(self._low, low), max(self._high, high)
        else:
            self._low += self._share * (low - self._low)
            self._high += self._share * (high - self._high)
        self.tokens += x.numel() // x.shape[-1]
        if self._counts is not None and finite:
            self._widen(max(-low, high))
            for part in torch.split(x.detach().reshape(-1), _CHUNK):
                places = (part.float().abs() * 2.0**-self._exponent).int()
                self._counts = self._counts.to(places.device) + torch.bincount(places, minlength=BINS)

    def _widen(self, largest: float) -> None:
        """Make the bins so wide that `largest` falls into the last one or before."""
        assert self._counts is not None
        while largest >= BINS * 2.0**self._exponent:
            if not bool(self._counts.any()):
                self._exponent = math.frexp(largest)[1] - BINS.bit_length() + 1
                continue
            self._counts = torch.cat((self._counts.view(-1, 2).sum(1), self._counts.new_zeros(BINS // 2)))
            self._exponent += 1

    def seen(self) -> Seen:
        """Return the sums so far."""
        counts = None if self._counts is None else self._counts.cpu()
        return Seen(self._low, self._high, counts, 2.0**self._exponent)


class Estimator(BaseModel, frozen=True, extra="forbid"):
    """Estimator of a grid's range. Fields are the knobs of a recipe."""

    counting: ClassVar[bool] = False  # whether it needs the histogram
    paper: ClassVar[str] = ""

    def observer(self) -> Observer:
        """Return a fresh one for one input."""
        return Observer(self.counting)

    def threshold(self, seen: Seen, num_bits: int, symmetric: bool) -> float:
        """Return the magnitude beyond which values are clipped."""
        raise NotImplementedError


class MinMax(Estimator, frozen=True):
    """All that was seen: nothing is clipped, and one outlier coarsens the grid for all."""

    paper: ClassVar[str] = "Krishnamoorthi 2018, Quantizing deep networks (section 3.1), arXiv 1806.08342"

    def threshold(self, seen: Seen, num_bits: int, symmetric: bool) -> float:
        """Return the largest magnitude."""
        return seen.largest


class MovingAverage(MinMax, frozen=True):
    """Moving averages of each batch's smallest and largest value: one batch's outlier counts little."""

    paper: ClassVar[str] = "Jacob et al. 2018, Integer-arithmetic-only inference (section 3.1), arXiv 1712.05877"
    averaging_constant: float = Field(0.1, gt=0, le=1)  # weight of a new batch

    def observer(self) -> Observer:
        """Return a fresh one for one input."""
        return Observer(False, self.averaging_constant)


class Percentile(Estimator, frozen=True):
    """The magnitude that this share of the values stays below."""

    counting: ClassVar[bool] = True
    paper: ClassVar[str] = "Wu et al. 2020, Integer quantization for inference (section 5.2), arXiv 2004.09602"
    percentile: float = Field(99.99, gt=0, le=100)

    def threshold(self, seen: Seen, num_bits: int, symmetric: bool) -> float:
        """Return the upper edge of the bin in which the share is reached."""
        assert seen.counts is not None
        below = seen.counts.cumsum(0).double()
        place = int(torch.searchsorted(below, float(below[-1]) * self.percentile / 100))
        return min((place + 1) * seen.width, seen.largest)


class MeanSquare(Estimator, frozen=True):
    """The least mean square error of rounding and clipping together."""

    counting: ClassVar[bool] = True
    paper: ClassVar[str] = "Sung et al. 2015, Resiliency of deep networks under quantization, arXiv 1511.06488"

    def threshold(self, seen: Seen, num_bits: int, symmetric: bool) -> float:
        """Return the best of the thresholds that are tried."""
        return _best(seen, lambda t: squared_error(seen, t, seen.step(t, num_bits, symmetric)))


class Entropy(Estimator, frozen=True):
    """The least KL divergence between the histogram and what the grid's levels leave of it."""

    counting: ClassVar[bool] = True
    paper: ClassVar[str] = "Migacz 2017, 8-bit inference with TensorRT (GTC S7310); Wu et al. 2020, arXiv 2004.09602"

    def threshold(self, seen: Seen, num_bits: int, symmetric: bool) -> float:
        """Return the best of the thresholds that have a bin for each level."""

        def loss(threshold: float) -> float:
            levels, bins = round(threshold / seen.step(threshold, num_bits, symmetric)), _bins(seen, threshold)
            return divergence(seen, bins, levels + 1) if bins > levels else math.inf

        return _best(seen, loss)


def _best(seen: Seen, loss: Callable[[float], float]) -> float:
    """Return the threshold of the least loss among seen.largest * 2^(-i / _STEPS); of equal ones the largest."""
    tried = [seen.largest * 2 ** (-i / _STEPS) for i in range(_STEPS * _HALVINGS + 1)]
    return min(tried, key=loss) if seen.largest > 0 else 0.0


def _bins(seen: Seen, threshold: float) -> int:
    """Count the bins up to `threshold`."""
    return min(BINS, math.ceil(threshold / seen.width))


def squared_error(seen: Seen, threshold: float, step: float) -> float:
    """Sum over all values of (x - x on the grid)^2, each taken at the middle of its bin."""
    assert seen.counts is not None
    filled = seen.counts.nonzero()[:, 0]
    middle = (filled.double() + 0.5) * seen.width
    error = middle.clamp(max=threshold).div(step).round_().mul_(step).sub_(middle)
    return float(error.square_().dot(seen.counts[filled].double()))


def divergence(seen: Seen, bins: int, levels: int) -> float:
    """KL(P || Q) in nats: P the first `bins` bins with all beyond added to the last, Q the same bins after each of
    `levels` equal parts has spread its sum over those of its bins that hold anything.

    The first bin, which zeros fill, counts like the second. Infinite where the last bin is empty and P has mass there.
    """
    assert seen.counts is not None
    counts = seen.counts.double()
    counts[0] = counts[1]
    p = counts[:bins].clone()
    filled = (p > 0).double()
    level = torch.arange(bins) * levels // bins
    sums = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, p)
    members = torch.zeros(levels, dtype=torch.float64).index_add_(0, level, filled)
    q = (sums / members.clamp(min=1))[level] * filled
    p[-1] += counts[bins:].sum()
    p, q = p / p.sum(), q / q.sum()
    return float(torch.special.xlogy(p, p).sub_(torch.special.xlogy(p, q)).sum())


ESTIMATORS: dict[str, type[Estimator]] = {
    "minmax": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": MeanSquare,
}


def named(estimator: Estimator) -> dict[str, Any]:
    """As it stands in a recipe: {name: knobs}."""
    name = next(name for name, kind in ESTIMATORS.items() if type(estimator) is kind)
    return {name: estimator.model_dump(mode="json")}

"""95 % intervals for what an evaluation measures.

Two ideas, nothing else:

- `wilson`: a share of successes among independent trials (Wilson 1927). It stays inside [0, 1] and is right where the
  plain normal interval is not: near 0 and 1 and for few trials.
- `Bootstrap`: the percentile bootstrap (Efron 1979) of a ratio of sums, `sum(a) / sum(b)`, over problems or windows.
  A mean is the ratio of values to ones, a mean per token the ratio of window sums to window token counts, and what a
  model keeps of its reference the ratio of their scores. Every quantity is computed on the *same* draws, so that what
  two models have in common (a hard problem is hard for both) cancels: the comparison is paired.

Left out: corrections for many comparisons, and bias-corrected (BCa) limits, which differ little at 1,000 problems.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from deepseek_compress.errors import DscError

Z95 = 1.959963984540054  # the 97.5 % point of the standard normal distribution
Interval = tuple[float, float]


def wilson(successes: float, trials: int) -> Interval:
    """Return the 95 % score interval of a share, `successes` of `trials` (Wilson 1927, equation 3 of Brown et al.
    2001)."""
    if trials <= 0:
        raise DscError("an interval over 0 trials", "evaluate at least one problem")
    share = successes / trials
    spread = Z95 * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    centre = share + Z95**2 / (2 * trials)
    scale = 1 + Z95**2 / trials
    low, high = (centre - spread) / scale, (centre + spread) / scale
    # At 0 and 1 the exact limit is the share itself; rounding may miss it by one unit in the last place.
    return (0.0 if successes <= 0 else max(low, 0.0), 1.0 if successes >= trials else min(high, 1.0))


class Bootstrap:
    """Paired resampling of `units` problems or windows: draw once, apply to every quantity.

    A draw of n units with replacement is a vector of multinomial counts, so all resampled sums are one matrix product
    `counts (resamples, units) @ values (units,)`.
    """

    def __init__(self, units: int, seed: int = 0, resamples: int = 2000) -> None:
        if units <= 0:
            raise DscError("a bootstrap over 0 units", "evaluate at least one problem or window")
        draws = np.random.default_rng(seed).multinomial(units, np.full(units, 1 / units), size=resamples)
        self.counts: NDArray[np.float64] = draws.astype(np.float64)  # (resamples, units)

    def ratio(self, values: ArrayLike, weights: ArrayLike | None = None) -> Interval | None:
        """Return the interval of `sum(values) / sum(weights)`; `weights` default to ones (a mean). None where
        undefined."""
        above = self._sums(values)
        below = self._sums(np.ones(self.counts.shape[1]) if weights is None else weights)
        kept = below != 0  # a resample without a single success of the reference has no ratio
        if not kept.all() and kept.mean() < 0.95:
            return None
        return _limits(above[kept] / below[kept])

    def difference(self, values: ArrayLike, reference: ArrayLike) -> Interval:
        """Return the interval of `mean(values) - mean(reference)` over the same units."""
        paired = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
        return _limits(self._sums(paired) / self.counts.shape[1])

    def exp_ratio(self, values: ArrayLike, weights: ArrayLike) -> Interval | None:
        """Return the interval of `exp(sum(values) / sum(weights))`: perplexity from negative log-likelihoods in
        nats."""
        limits = self.ratio(values, weights)
        return None if limits is None else (safe_exp(limits[0]), safe_exp(limits[1]))

    def _sums(self, values: ArrayLike) -> NDArray[np.float64]:
        array = np.asarray(values, dtype=np.float64)
        if array.shape != (self.counts.shape[1],):
            raise ValueError(f"expected {self.counts.shape[1]} values, one a unit, got shape {array.shape}")
        sums: NDArray[np.float64] = self.counts @ array
        return sums


def ratio_of_means(values: Sequence[float], reference: Sequence[float]) -> float | None:
    """`mean(values) / mean(reference)`, None where the reference has nothing to keep."""
    total = math.fsum(reference)
    return math.fsum(values) / total if total else None


def safe_exp(nats: float) -> float:
    """`exp`, with infinity instead of an overflow: a broken model may need more than 709 nats per token."""
    return math.exp(nats) if nats < 709.0 else math.inf


def _limits(samples: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(samples, [0.025, 0.975])
    return float(low), float(high)

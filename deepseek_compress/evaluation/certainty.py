"""Certainty of a difference between two models on the same problems, and the number of problems that would settle it.

Of n problems, `lost` were answered by the reference alone and `gained` by the model alone; all else cancels.

- `mcnemar`: the mid-p test of lost = gained (Fagerland et al. 2013, doi 10.1186/1471-2288-13-91): with m = lost +
  gained and k the smaller of the two, p = 2 P(X < k) + P(X = k), X binomial (m, 1/2). Its size stays near 5 %,
  that of the exact test far below.
- `tango`: the score interval of the difference (gained - lost) / n (Tango 1998, Statistics in Medicine 17). It is not
  empty where nothing flipped: 0 of 1,000 flips still could hide 0.4 points. A bootstrap would say 0.
- `power`: the chance that `mcnemar` finds given rates of loss and gain in n problems, summed exactly.
- `holm`: p values where several models are compared with one reference (Holm 1979).

Where answers are sampled, a problem has a share instead of 0 or 1: then a sign-flip test over the problems' differences
stands for McNemar's, of which it is the general form, and the paired bootstrap's interval for Tango's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize
from scipy.stats import binom, norm

from deepseek_compress.evaluation.statistics import Bootstrap, Interval

LEVEL = 0.05
SURE = 0.8  # chance that a difference is found, for which `needed` counts problems
POINT = 0.01
EXACT_UP_TO = 20_000  # problems; beyond it the normal formula is as good
FLIPS = 10_000  # of the signs


def mcnemar(lost: int, gained: int) -> float:
    """Return the two-sided mid-p value of equal chances to lose and to gain."""
    count, few = lost + gained, min(lost, gained)
    if not count:
        return 1.0
    return min(1.0, float(2 * binom.cdf(few, count, 0.5) - binom.pmf(few, count, 0.5)))


def tango(lost: int, gained: int, problems: int, level: float = LEVEL) -> Interval:
    """Return the 1 - level interval of (gained - lost) / problems."""
    z, seen = float(norm.ppf(1 - level / 2)), (gained - lost) / problems

    def score(difference: float) -> float:
        a = 2 * problems
        b = -gained - lost + (2 * problems - gained + lost) * difference
        c = -lost * difference * (1 - difference)
        losing = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # the likeliest rate of loss under `difference`
        variance = problems * (2 * losing + difference * (1 - difference))
        return (gained - lost - problems * difference) / math.sqrt(variance) if variance > 0 else math.inf

    def solve(low: float, high: float, target: float) -> float:
        return float(optimize.brentq(lambda difference: score(difference) - target, low, high))

    tiny = 1e-12
    low = -1.0 if lost == problems else solve(-1 + tiny, seen - tiny, z)
    high = 1.0 if gained == problems else solve(seen + tiny, 1 - tiny, -z)
    return low, high


def critical(counts: NDArray[np.int64], level: float = LEVEL) -> NDArray[np.int64]:
    """For each number of flips the largest number in the rarer direction that still is a difference; -1: none is."""
    found = np.full(len(counts), -1)
    middle = binom.ppf(level / 2, counts, 0.5).astype(np.int64)
    for few in (middle - 1, middle, middle + 1):  # rising, so that the largest stays
        p = 2 * binom.cdf(few, counts, 0.5) - binom.pmf(few, counts, 0.5)
        found = np.where((few >= 0) & (2 * few < counts) & (p < level), few, found)
    return found


def power(problems: int, lost: float, gained: float, level: float = LEVEL) -> float:
    """Return the chance that `mcnemar` gives p < level, for rates `lost` and `gained` a problem."""
    rate = lost + gained
    if rate <= 0:
        return 0.0
    spread = 7 * math.sqrt(problems * rate * (1 - rate)) + 2
    counts = np.arange(max(0, int(problems * rate - spread)), min(problems, int(problems * rate + spread)) + 1)
    limits = critical(counts, level)
    found = binom.cdf(limits, counts, lost / rate) + binom.cdf(limits, counts, gained / rate)
    return float((binom.pmf(counts, problems, rate) * np.where(limits >= 0, found, 0.0)).sum())


def needed(difference: float, rate: float, level: float = LEVEL, sure: float = SURE) -> int:
    """Problems for which a true `difference` is found with the chance `sure`, where a share `rate` of answers flips."""
    difference = min(abs(difference), 1.0)
    rate = min(max(rate, difference), 1.0)  # fewer flips than that cannot make the difference
    z = float(norm.ppf(1 - level / 2)), float(norm.ppf(sure))
    first = ((z[0] * math.sqrt(rate) + z[1] * math.sqrt(rate - difference**2)) / difference) ** 2  # Connor 1987
    lost = (rate + difference) / 2
    count = max(2, math.ceil(first))
    if count > EXACT_UP_TO:
        return count
    step = max(1, count // 50)
    while count > step and power(count - step, lost, rate - lost, level) >= sure:  # the formula errs on either side
        count -= step
    while power(count, lost, rate - lost, level) < sure:
        count += step
    return count


def sign_flips(differences: Sequence[float], seed: int = 0) -> float:
    """Return the two-sided p value of a mean of 0, by flipping signs: exact in the limit, the same for the same
    seed."""
    found = np.asarray(differences, dtype=np.float64)
    found = found[found != 0]
    if not len(found):
        return 1.0
    rng, seen = np.random.default_rng(seed), abs(found.sum()) - 1e-9
    sums = (rng.integers(0, 2, size=(FLIPS, len(found)), dtype=np.int8) * 2 - 1) @ found
    return float((1 + (np.abs(sums) >= seen).sum()) / (1 + FLIPS))


def holm(values: Sequence[float]) -> list[float]:
    """p values corrected for being several (step-down)."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    found, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        found[index] = largest
    return found


def interval_of(
    mine: Sequence[float], theirs: Sequence[float], draws: Bootstrap | None = None, level: float = LEVEL, seed: int = 0
) -> Interval:
    """Return the 1 - level interval of the mean difference; `draws` resample shares of sampled answers."""
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    if not _binary(mine, theirs):
        return (draws or Bootstrap(len(differences), seed)).difference(mine, theirs)
    lost, gained = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    return tango(lost, gained, len(differences), level)


def _binary(mine: Sequence[float], theirs: Sequence[float]) -> bool:
    return all(value in (0.0, 1.0) for value in (*mine, *theirs))


def paired(
    mine: Sequence[float], theirs: Sequence[float], draws: Bootstrap | None = None, level: float = LEVEL, seed: int = 0
) -> dict[str, Any]:
    """Return what the scores of two models on the same problems tell: the entry `certainty` of a report.

    `hidden`: points of loss that this number of problems cannot rule out; `needed`: problems that would show a loss of
    one point, at the share of flips seen here. `draws` resample shares of sampled answers.
    """
    differences = [a - b for a, b in zip(mine, theirs, strict=True)]
    lost, gained = sum(d < 0 for d in differences), sum(d > 0 for d in differences)
    binary = _binary(mine, theirs)
    count, mean = len(differences), math.fsum(differences) / len(differences)
    interval = interval_of(mine, theirs, draws, level, seed)
    p = mcnemar(lost, gained) if binary else sign_flips(differences, seed)
    if binary:
        enough = needed(POINT, (lost + gained) / count)
    else:
        spread = max(float(np.std(differences)), 0.1)
        enough = math.ceil(((float(norm.ppf(1 - level / 2)) + float(norm.ppf(SURE))) * spread / POINT) ** 2)
    return {
        "difference": mean, "interval": interval, "p": p, "p_holm": p, "lost": lost, "gained": gained,
        "problems": count, "hidden": max(0.0, -interval[0]), "needed": enough, "level": level,
    }  # fmt: skip


def correct(found: Sequence[dict[str, Any]]) -> None:
    """Put Holm's p values into the entries of all models that one reference was compared with."""
    for entry, value in zip(found, holm([entry["p"] for entry in found]), strict=True):
        entry["p_holm"] = value


def differs(found: Mapping[str, Any]) -> bool:
    """Whether the entry is a difference, after Holm's correction."""
    return bool(found["p_holm"] < found.get("level", LEVEL))


def settled(interval: Interval, points: float) -> bool:
    """Whether a loss of `points` / 100 is ruled out, or a loss or a gain is certain."""
    return interval[0] > -points / 100 or interval[1] < 0 or interval[0] > 0

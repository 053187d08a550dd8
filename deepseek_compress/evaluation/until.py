"""`until`: more problems, until a difference of so many points is settled or a limit is reached.

After 250, 500, 1,000, ... problems the intervals of all models are looked at. Looking often would find differences that
are not there, so each of the looks that may come has its share of the 5 % (Bonferroni): what is settled at one of them
holds with the confidence of a single look at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from deepseek_compress.evaluation.certainty import LEVEL, interval_of, settled

FIRST = 250


class Settled(NamedTuple):
    """After how many problems it ended, at which level each look was taken, and whether all is settled."""

    problems: int
    level: float
    done: bool


def looks(limit: int, first: int = FIRST) -> list[int]:
    """Numbers of problems after which intervals are looked at, `limit` the last."""
    found = []
    while first < limit:
        found.append(first)
        first *= 2
    return [*found, limit]


def settle(
    points: float,
    limit: int,
    reference: str,
    others: Sequence[str],
    scores: Callable[[str, int], list[float]],
    seed: int = 0,
) -> Settled:
    """Ask until each of `others` is settled; `scores(name, count)`: of the first `count` problems."""
    counts = looks(limit)
    level = LEVEL / len(counts)
    for count in counts:
        theirs = scores(reference, count)
        found = [interval_of(scores(name, count), theirs, None, level, seed) for name in others]
        if all(settled(interval, points) for interval in found):
            return Settled(count, level, True)
    return Settled(limit, level, False)

"""Which windows of a pool to calibrate on, from what the model makes of each.

By quality, greedily: the next window is the one with the largest

    Q(x) = alpha * entropy(x) + beta * diversity(x)

entropy: of the model's own prediction, mean over the window's positions. diversity: distance of the window's mean
hidden state to the nearest one that is chosen already, to the pool's mean while there is none; with alpha = 0 this is
the farthest-point traversal of Gonzalez (1985, Clustering to minimize the maximum intercluster distance), by which
Sener and Savarese (arXiv 1708.00489, algorithm 1) choose data. States are scaled to length 1, and both terms to 0..1
over the pool, so that alpha and beta compare.

By coverage of experts, greedily: the next window is the one that adds most to

    sum over all experts of all blocks of log(1 + tokens)

A token counts most where there are fewest, a soft form of raising the least; the sum is monotone and submodular, so the
greedy choice reaches 1 - 1/e of the best one (Nemhauser, Wolsey and Fisher 1978). Ties go to the earlier window.

Left out: windows are chosen whole, and nothing is weighted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class Candidates(NamedTuple):
    """Scores of each of n windows under the model."""

    entropy: Tensor  # float64 (n,), nats
    states: Tensor  # float64 (n, hidden): mean of what enters the head
    experts: Tensor | None  # int64 (n, blocks, experts): tokens sent to each; None without experts


class Quota(NamedTuple):
    """Windows that each source may give."""

    source: Sequence[int]  # of each window
    counts: Sequence[int]  # of each source


def by_quality(found: Candidates, count: int, alpha: float, beta: float, quota: Quota | None = None) -> list[int]:
    """Return the `count` windows of largest Q, in the order of the pool."""
    states = functional.normalize(found.states.double(), dim=1)
    entropy = found.entropy.double() - found.entropy.min()
    nearest: Tensor = (states - states.mean(0)).norm(dim=1)
    largest = max((float((states - state).norm(dim=1).max()) for state in states), default=0.0)
    spread, width = float(entropy.max()) or 1.0, largest or 1.0
    chosen: list[int] = []

    def quality() -> Tensor:
        nonlocal nearest
        if chosen:
            distance = (states - states[chosen[-1]]).norm(dim=1)
            nearest = distance if len(chosen) == 1 else torch.minimum(nearest, distance)
        return alpha * entropy / spread + beta * nearest / width

    return _greedy(quality, chosen, count, len(states), quota)


def by_coverage(experts: Tensor, count: int, quota: Quota | None = None) -> list[int]:
    """Return the `count` windows of experts (n, blocks, experts) that reach the experts most evenly, in the pool's
    order."""
    tokens = experts.flatten(1).double()
    reached = torch.zeros(tokens.shape[1], dtype=torch.float64)
    chosen: list[int] = []

    def gain() -> Tensor:
        nonlocal reached
        if chosen:
            reached = reached + tokens[chosen[-1]]
        return torch.stack([((1 + reached + row) / (1 + reached)).log().sum() for row in tokens])

    return _greedy(gain, chosen, count, len(tokens), quota)


def coverage(experts: Tensor, chosen: Sequence[int]) -> dict[str, int]:
    """Count the tokens of the windows `chosen` at each expert: over all blocks, of experts (n, blocks, experts)."""
    return spread(experts[list(chosen)].sum(0).flatten().tolist())


def spread(tokens: Iterable[int]) -> dict[str, int]:
    """Measure how unevenly tokens spread over experts: experts without any, and the fewest, median and most of one."""
    counts = sorted(tokens)
    return {"unreached": counts.count(0), "fewest": counts[0], "median": counts[len(counts) // 2], "most": counts[-1]}


def _greedy(score: Callable[[], Tensor], chosen: list[int], count: int, size: int, quota: Quota | None) -> list[int]:
    """Fill `chosen` with the window of largest score() (size,) among those left, `count` times."""
    open_ = torch.ones(size, dtype=torch.bool)
    left = list(quota.counts) if quota else []
    if quota:
        open_ &= torch.tensor([left[source] > 0 for source in quota.source])
    for _ in range(count):
        scores = score().masked_fill(~open_, -torch.inf).numpy()
        best = int(scores.argmax())  # numpy's: the first of equals
        chosen.append(best)
        open_[best] = False
        if quota:
            source = quota.source[best]
            left[source] -= 1
            if not left[source]:
                open_ &= torch.tensor([other != source for other in quota.source])
    return sorted(chosen)

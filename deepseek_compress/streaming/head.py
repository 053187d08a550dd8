"""A model's predictions, piece by piece of rows and of the vocabulary: the logits are never whole in memory.

With l the logits of a row, m the largest so far and z = sum exp(l - m), everything else follows from sums that are
corrected whenever m grows:

    log p(v)      = l_v - m - log z
    entropy       = log z + m - sum exp(l - m) l / z
    KL(p || q)    = sum exp(l_p - m_p) (l_p - l_q) / z_p - (m_p + log z_p) + (m_q + log z_q)

Sums are float64, logits float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.checkpoint.reader import check_finite

LOGITS = 1 << 22  # numbers of a piece of the logits
WEIGHTS = 1 << 26  # numbers of the part of a head that is float32 at a time: 256 MB

Rows = Callable[[int, int], Tensor]  # (start, count) -> float32 (count, hidden)


class HeadInput(NamedTuple):
    """Inputs of a head: `rows(start, count)` float32 (count, hidden), and the head (vocabulary, hidden)."""

    rows: Rows
    head: Tensor

    @classmethod
    def of(cls, hidden: Tensor, head: Tensor) -> HeadInput:
        """For hidden (n, hidden) in memory."""
        return cls(lambda start, count: hidden[start : start + count], head)


class Scores(NamedTuple):
    """Of the models side by side at n positions, float64; the first is the reference of the others."""

    nll: Tensor  # (models, n): -log q of the token that follows, nats
    kl: Tensor  # (models, n): KL(p || q), 0 for the reference itself
    best: Tensor  # int64 (models, n): the most likely token
    entropy: Tensor  # (n,): of the reference's prediction, nats


def pieces(
    models: Sequence[HeadInput], count: int, logits: int = LOGITS, weights: int = WEIGHTS
) -> Iterator[tuple[slice, int, list[Tensor]]]:
    """(rows, first token of the part of the vocabulary, logits float32 (rows, tokens) of each model)."""
    vocabulary, width = len(models[0].head), max(model.head.shape[1] for model in models)
    step = max(1, weights // width)
    for first in range(0, vocabulary, step):
        parts = [model.head[first : first + step].float() for model in models]
        some = max(1, logits // len(parts[0]))
        for start in range(0, count, some):
            rows = slice(start, min(start + some, count))
            yield (
                rows,
                first,
                [
                    functional.linear(model.rows(start, rows.stop - start).to(part.device), part)
                    for model, part in zip(models, parts, strict=True)
                ],
            )


@torch.no_grad()
def scores(models: Sequence[HeadInput], following: Tensor) -> Scores:
    """Compare what `models` predict at the positions whose next tokens are `following`, int64 (n,)."""
    device = models[0].head.device
    following, count = following.to(device), len(following)
    shape = (len(models), count)
    top = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
    mass, gaps, picked = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3))
    best = torch.zeros(shape, dtype=torch.long, device=device)
    for rows, first, logits in pieces(models, count):
        own = following[rows] - first
        inside = (own >= 0) & (own < logits[0].shape[1])
        place = own.clamp(0, logits[0].shape[1] - 1)[:, None]
        expected = logits[0].double()
        shares, shrunk = torch.empty(0), torch.empty(0)  # of the reference, which comes first
        for number, part in enumerate(logits):
            check_finite("logits of the model", part)
            wide = expected if number == 0 else part.double()
            largest, where = wide.max(1)
            higher = torch.maximum(top[number, rows], largest)
            kept, raised = (top[number, rows] - higher).exp(), (wide - higher[:, None]).exp_()
            mass[number, rows] = mass[number, rows] * kept + raised.sum(1)
            best[number, rows] = torch.where(largest > top[number, rows], where + first, best[number, rows])
            top[number, rows] = higher
            picked[number, rows] += torch.where(inside, wide.gather(1, place)[:, 0], 0.0)
            if number == 0:
                shares, shrunk = raised, kept
                gaps[0, rows] = gaps[0, rows] * kept + (raised * wide).sum(1)  # for its entropy
            else:
                gaps[number, rows] = gaps[number, rows] * shrunk + (shares * (expected - wide)).sum(1)
    total = top + mass.log()
    entropy = total[0] - gaps[0] / mass[0]
    kl = gaps / mass[0] - total[0] + total
    kl[0] = 0.0
    return Scores((total - picked).cpu(), kl.cpu(), best.cpu(), entropy.cpu())


@torch.no_grad()
def entropy(model: HeadInput, count: int) -> Tensor:
    """Entropy of the prediction at each of `count` positions, float32, in nats."""
    device = model.head.device
    largest = torch.full((count,), -torch.inf, device=device)
    z, e = torch.zeros(count, device=device), torch.zeros(count, device=device)
    for rows, _, (logits,) in pieces([model], count, 4 * LOGITS):
        m = torch.maximum(largest[rows], logits.amax(1))
        mass = (logits - m[:, None]).exp()
        before = (largest[rows] - m).exp()
        z[rows] = z[rows] * before + mass.sum(1)
        e[rows] = e[rows] * before + (mass * logits).sum(1)
        largest[rows] = m
    return (z.log() + largest - e / z).cpu()

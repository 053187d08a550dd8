"""A few entries of each of the teacher's distributions: what a cache keeps of it.

`top_k` keeps the likeliest tokens. `sampled` keeps n tokens by systematic sampling with probability proportional to
size (Madow 1949; Random Sampling KD, arXiv 2503.16870, draws with replacement instead): token i with probability
min(1, p_i / tau), tau such that these add up to n. Tokens above tau, the c likeliest, are always there; each other one
stands for a mass of tau = (1 - sum of the c) / (n - c). Of all ways to keep n tokens that are right in the mean, this
leaves the squared error of p smallest.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

CHUNK = 1 << 22  # probabilities in float64 at a time: 32 MB


class Words(NamedTuple):
    """Entries of N distributions, n of each, likeliest first."""

    ids: Tensor  # int64 (N, n)
    log_probs: Tensor  # float32 (N, n)
    certain: Tensor  # int64 (N,): c, how many were not drawn


def top_k(log_probs: Tensor, count: int) -> Words:
    """Return the `count` likeliest tokens of each row of `log_probs` (N, vocabulary)."""
    best = log_probs.topk(min(count, log_probs.shape[-1]), dim=-1)
    return Words(best.indices, best.values, whole(log_probs, best.indices.shape[-1]))


def whole(rows: Tensor, count: int) -> Tensor:
    """`count` for each of the `rows`: (N,), where nothing is drawn."""
    return torch.full((len(rows),), count, device=rows.device)


def sampled(log_probs: Tensor, count: int, draws: Tensor) -> Words:
    """`count` tokens of each row of `log_probs` (N, vocabulary); `draws` float64 (N,), uniform in [0, 1)."""
    if count >= log_probs.shape[-1]:
        return top_k(log_probs, count)
    step = max(1, CHUNK // log_probs.shape[-1])
    parts = [
        _sampled(log_probs[start : start + step], count, draws[start : start + step])
        for start in range(0, len(log_probs), step)
    ]
    return Words(*(torch.cat(values) for values in zip(*parts, strict=True)))


def _sampled(log_probs: Tensor, count: int, draws: Tensor) -> Words:
    p = log_probs.double().exp()
    p = p / p.sum(-1, keepdim=True)
    tau, certain = _threshold(p, count)
    ends = (p / tau[:, None]).clamp(max=1.0).cumsum(-1)  # token i lies on [ends[i - 1], ends[i]) of a line of length n
    points = torch.arange(count, dtype=torch.float64, device=p.device) + draws[:, None]
    ids = torch.searchsorted(ends, points * (ends[:, -1:] / count), right=True).clamp(max=p.shape[-1] - 1)
    kept = log_probs.gather(-1, ids).sort(dim=-1, descending=True)
    return Words(ids.gather(-1, kept.indices), kept.values, certain)


def _threshold(p: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """tau (N,) with sum(min(1, p / tau)) = count, and the number of tokens above it."""
    best = p.topk(count, dim=-1).values
    before = best.cumsum(-1) - best  # mass of the c likeliest, c = 0, 1, ...
    tau = (1 - before).clamp(min=1e-300) / (count - torch.arange(count, device=p.device))
    fits = best <= tau  # the next likeliest is not certain any more
    certain = torch.where(fits.any(-1), fits.int().argmax(-1), count - 1)
    return tau.gather(-1, certain[:, None])[:, 0], certain

"""What the student is asked to match: the teacher's tempered distribution and the text itself.

    loss = (1 - a) T^2 KL(teacher_T || student_T) + a CE(student, next token)

(Hinton, Vinyals & Dean 2015, arXiv 1503.02531, section 2.) Of the teacher only the k most likely tokens are kept; the
rest of its probability is one bucket, and the student's rest is compared with it, so that the student is not pushed to
forget what the teacher thought possible. Where T is not 1 the bucket is tempered as if its probability were spread
evenly over its tokens.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

FLOOR = 1e-9  # least probability of a bucket: a teacher stored in 16 bits may add up to one or more


class Target(NamedTuple):
    """The teacher at N positions."""

    ids: Tensor  # int64 (N, k), most likely first
    log_probs: Tensor  # float32 (N, k), natural logarithm, at temperature 1
    labels: Tensor  # int64 (N,), the token that follows in the text
    weights: Tensor  # float32 (N,), share of each position in the mean


def distillation_loss(logits: Tensor, target: Target, temperature: float, cross_entropy: float) -> Tensor:
    """Weighted mean over positions; `logits` float32 (N, vocab) of the student; `cross_entropy` is the share a."""
    soft = topk_divergence(logits, target, temperature) * temperature**2
    hard = functional.cross_entropy(logits, target.labels, reduction="none")
    each = (1 - cross_entropy) * soft + cross_entropy * hard
    return (each * target.weights).sum() / target.weights.sum()


def topk_divergence(logits: Tensor, target: Target, temperature: float) -> Tensor:
    """KL in nats at each position over k tokens and the bucket of all others: (N,)."""
    others = logits.shape[-1] - target.ids.shape[-1]
    teacher = _with_rest(target.log_probs, others, temperature)
    scaled = functional.log_softmax(logits / temperature, dim=-1)
    chosen = scaled.gather(-1, target.ids)
    if others == 0:
        student = chosen
    else:
        inside = torch.zeros_like(scaled, dtype=torch.bool).scatter(-1, target.ids, True)
        rest = scaled.masked_fill(inside, float("-inf")).logsumexp(-1, keepdim=True)
        student = torch.cat((chosen, rest), dim=-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def _with_rest(log_probs: Tensor, others: int, temperature: float) -> Tensor:
    """log_probs (N, k) -> tempered log-probabilities of the k and of the bucket, (N, k + 1), adding up to one."""
    if others == 0:
        return functional.log_softmax(log_probs / temperature, dim=-1)
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=FLOOR).log()
    # tempered: others * (rest / others) ** (1 / T)
    rest = (rest - math.log(others)) / temperature + math.log(others)
    return functional.log_softmax(torch.cat((log_probs / temperature, rest), dim=-1), dim=-1)

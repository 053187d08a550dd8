"""Losses between the teacher's distribution p and the student's q at each position; each is least where q = p.

At temperature T both are softmax(logits / T), and a divergence counts T^2 times (Hinton, Vinyals & Dean 2015, arXiv
1503.02531, section 2). A target names tokens of p in one of three forms; p and q become distributions over M entries:

    exact     every token of the vocabulary
    top-k     the k likeliest tokens, and one bucket with all others, whose q is summed too
    sampled   the c likeliest, and m others drawn with a probability proportional to p_i: each stands for P / m, where
              P = 1 - sum of the c; the student's Q is shared among them as q_i / p_i is (importance weights, as in
              Random Sampling KD, arXiv 2503.16870)

So for every draw the entries of p and q each add up to one, a student equal to its teacher has loss 0 and gradient 0,
and no weight is unbounded. Where q differs from p anywhere, some draw shows it; the mean of forward KL over draws is at
most the KL of all tokens and nears it as m grows. Importance weights alone would make the mean exact,
but leave noise as the gradient at q = p.

p is recorded at the temperature that the student is compared at. Tempering a bucket afterwards, when its tokens are no
longer known, moves the minimum away from the teacher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn import functional

from deepseek_compress.errors import DscError
from deepseek_compress.registry import build

FLOOR = 1e-9  # least probability of a bucket: entries stored in 16 bits may add up to one or more


class Target(NamedTuple):
    """The teacher's distribution at N positions."""

    log_probs: Tensor  # float32 (N, M), log p at the temperature
    ids: Tensor | None = None  # int64 (N, M), likeliest first; None: all tokens in their order
    certain: Tensor | None = None  # int64 (N,): c of a sampled target; None: what is not named is one bucket


class Entries(NamedTuple):
    """Two distributions over the entries of a target, float32 (N, M)."""

    log_p: Tensor
    log_q: Tensor


class Loss(BaseModel, frozen=True, extra="forbid"):
    """A part of what the student is trained on; `share` is its weight in the sum."""

    paper: ClassVar[str] = ""
    share: float = Field(default=1.0, gt=0)


class Divergence(Loss, frozen=True):
    """Compares q with p, entry by entry."""

    def terms(self, at: Entries) -> Tensor:
        """(N, M), each at least 0, and 0 where q = p: sum(q) - sum(p) = 0 is part of KL."""
        raise NotImplementedError


class ForwardKl(Divergence, frozen=True):
    """KL(p || q): the student covers all that the teacher thinks possible."""

    paper: ClassVar[str] = "Hinton, Vinyals & Dean 2015, Distilling the Knowledge, arXiv 1503.02531"

    def terms(self, at: Entries) -> Tensor:
        """See `Divergence`."""
        p = at.log_p.exp()
        return p * (at.log_p - at.log_q) - p + at.log_q.exp()


class ReverseKl(Divergence, frozen=True):
    """KL(q || p): the student keeps to what the teacher thinks likely."""

    paper: ClassVar[str] = "Gu et al. 2024, MiniLLM, arXiv 2306.08543"

    def terms(self, at: Entries) -> Tensor:
        """See `Divergence`."""
        q = at.log_q.exp()
        return q * (at.log_q - at.log_p) - q + at.log_p.exp()


class JensenShannon(Divergence, frozen=True):
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q."""

    paper: ClassVar[str] = "Agarwal et al. 2024, GKD, arXiv 2306.13649"
    beta: float = Field(default=0.5, gt=0, lt=1)

    def terms(self, at: Entries) -> Tensor:
        """See `Divergence`."""
        p, q = at.log_p.exp(), at.log_q.exp()
        log_m = (self.beta * p + (1 - self.beta) * q).clamp(min=torch.finfo(p.dtype).tiny).log()
        return self.beta * p * (at.log_p - log_m) + (1 - self.beta) * q * (at.log_q - log_m)


class TotalVariation(Divergence, frozen=True):
    """Half the sum of |p - q|."""

    paper: ClassVar[str] = "Wen et al. 2023, f-Divergence Minimization for Sequence-Level KD, arXiv 2307.15190"

    def terms(self, at: Entries) -> Tensor:
        """See `Divergence`."""
        return 0.5 * (at.log_p.exp() - at.log_q.exp()).abs()


class CrossEntropy(Loss, frozen=True):
    """The text itself: -log q of the token that follows, at temperature 1."""

    paper: ClassVar[str] = "Hinton, Vinyals & Dean 2015, arXiv 1503.02531, section 2"


class HiddenStates(Loss, frozen=True):
    """Mean square error of hidden states after a learned projection, by the teacher's mean square."""

    paper: ClassVar[str] = "Jiao et al. 2020, TinyBERT, arXiv 1909.10351"


class Router(Loss, frozen=True):
    """KL between the gate weights of the two routers, block by block."""


class Contrastive(Loss, frozen=True):
    """InfoNCE: a text's pooled hidden state lies nearer to the teacher's of that text than to those of others."""

    paper: ClassVar[str] = "Tian, Krishnan & Isola 2020, Contrastive Representation Distillation, arXiv 1910.10699"
    tau: float = Field(default=0.1, gt=0)  # temperature of the comparison


LOSSES: dict[str, type[Loss]] = {
    "forward_kl": ForwardKl,
    "reverse_kl": ReverseKl,
    "jensen_shannon": JensenShannon,
    "total_variation": TotalVariation,
    "cross_entropy": CrossEntropy,
    "hidden_states": HiddenStates,
    "router": Router,
    "contrastive": Contrastive,
}


def losses_of(value: Any) -> tuple[Loss, ...]:
    """`forward_kl`, `{forward_kl: 0.7, cross_entropy: 0.3}` or `{jensen_shannon: {beta: 0.1}}` -> the losses."""
    given = {value: {}} if isinstance(value, str) else value
    if not isinstance(given, Mapping) or not given:
        raise DscError(f"loss: got {value!r}", "write it as {forward_kl: 0.7, cross_entropy: 0.3}")
    found = []
    for name, knobs in given.items():
        if name not in LOSSES:
            raise DscError(f"unknown loss {name!r}", f"valid names: {', '.join(LOSSES)}")
        settings = knobs if isinstance(knobs, Mapping) else {} if knobs is None else {"share": knobs}
        found.append(build(LOSSES[name], settings, f"loss {name}"))
    return tuple(found)


def entries(logits: Tensor, target: Target, temperature: float) -> Entries:
    """Teacher and student at the target's entries; `logits` float32 (N, vocabulary) over the tokens of both."""
    log_q = functional.log_softmax(logits / temperature, dim=-1)
    if target.ids is None:
        return Entries(target.log_probs, log_q)
    chosen = log_q.gather(-1, target.ids)
    if target.ids.shape[-1] == log_q.shape[-1]:
        return Entries(target.log_probs, chosen)
    if target.certain is None:
        others = _log_rest(log_q, target.ids, torch.ones_like(target.ids, dtype=torch.bool))
        rest = (1 - target.log_probs.exp().sum(-1, keepdim=True)).clamp(min=FLOOR).log()
        return Entries(torch.cat((target.log_probs, rest), -1), torch.cat((chosen, others), -1))
    count = target.ids.shape[-1]
    certain = torch.arange(count, device=chosen.device) < target.certain[:, None]
    p_rest = (1 - (target.log_probs.exp() * certain).sum(-1, keepdim=True)).clamp(min=FLOOR).log()
    drawn = (count - target.certain[:, None]).clamp(min=1).log()
    ratio = (chosen - target.log_probs).masked_fill(certain, float("-inf"))
    ours = _log_rest(log_q, target.ids, certain) + functional.log_softmax(ratio, dim=-1)
    return Entries(torch.where(certain, target.log_probs, p_rest - drawn), torch.where(certain, chosen, ours))


def _log_rest(log_q: Tensor, ids: Tensor, named: Tensor) -> Tensor:
    """log of the probability of all tokens but those of `ids` where `named`: (N, 1)."""
    inside = torch.zeros_like(log_q, dtype=torch.bool).scatter(-1, ids, named)
    return log_q.masked_fill(inside, float("-inf")).logsumexp(-1, keepdim=True)


def total(divergence: Divergence, at: Entries) -> Tensor:
    """Return the divergence at each position (N,)."""
    return divergence.terms(at).sum(-1)

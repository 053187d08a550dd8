"""Losses on what lies inside the models: hidden states, routers, pooled texts. They need the teacher itself.

`hidden_states` and `contrastive` compare through a learned projection W (teacher's width, student's width), the
identity at first, so that they are 0 (hidden states) or what the teacher has with itself (contrastive) for a student
that is the teacher. With views of two texts and more a contrastive loss can be lower than that: it is the one loss here
whose minimum is not the teacher, and it belongs with one of the divergences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.distillation.documents import Batch
from deepseek_compress.distillation.losses import Contrastive, HiddenStates, Loss, Router
from deepseek_compress.distillation.views import View
from deepseek_compress.errors import DscError
from deepseek_compress.models import ModelConfig

INSIDE = (HiddenStates, Router, Contrastive)
PROJECTED = {HiddenStates: "hidden_states", Contrastive: "contrastive"}


class Pair(NamedTuple):
    """A block of the student, the teacher's it is compared with, and the teacher's experts that are the student's."""

    student: int
    teacher: int
    experts: list[int] | None = None  # None: all


def even_pairs(student: ModelConfig, teacher: ModelConfig) -> list[Pair]:
    """Each block of the student with the teacher's block at the same share of the depth."""
    ours, theirs = student.num_hidden_layers, teacher.num_hidden_layers
    return [Pair(layer, round((layer + 1) * theirs / ours) - 1) for layer in range(ours)]


def projections(losses: Sequence[Loss], student: ModelConfig, teacher: ModelConfig) -> dict[str, Tensor]:
    """Return the learned projection of each loss that has one: float32 (teacher's width, student's width)."""
    shape = (teacher.hidden_size, student.hidden_size)
    return {PROJECTED[type(loss)]: torch.eye(*shape) for loss in losses if type(loss) in PROJECTED}


def inside_loss(
    losses: Sequence[Loss],
    student: View,
    teacher: View,
    batch: Batch,
    pairs: Sequence[Pair],
    projected: Mapping[str, Tensor],
) -> Tensor:
    """Return the weighted sum of those among `losses` that look inside; 0 where there are none."""
    total = student.final.new_zeros(())
    weights = batch.weights / batch.weights.sum()
    for loss in losses:
        if isinstance(loss, HiddenStates):
            total = total + loss.share * _hidden(student, teacher, weights, pairs, projected["hidden_states"])
        elif isinstance(loss, Router):
            total = total + loss.share * _routers(student, teacher, weights, pairs)
        elif isinstance(loss, Contrastive):
            total = total + loss.share * _contrastive(student, teacher, batch, projected["contrastive"], loss.tau)
    return total


def _hidden(student: View, teacher: View, weights: Tensor, pairs: Sequence[Pair], projection: Tensor) -> Tensor:
    """Mean over blocks of ||W h - t||^2 / mean ||t||^2."""
    parts = []
    for pair in pairs:
        wanted = teacher.hidden[pair.teacher].float()
        error = (functional.linear(student.hidden[pair.student].float(), projection) - wanted).square().sum(-1)
        parts.append((weights * error).sum() / (weights * wanted.square().sum(-1)).sum())
    return torch.stack(parts).mean()


def _routers(student: View, teacher: View, weights: Tensor, pairs: Sequence[Pair]) -> Tensor:
    parts = []
    for pair in pairs:
        if pair.student not in student.routers or pair.teacher not in teacher.routers:
            continue
        p, q = teacher.routers[pair.teacher], student.routers[pair.student]
        p = p if pair.experts is None else p[:, pair.experts]
        if p.shape != q.shape:
            what = f"loss router: {q.shape[1]} experts in the student, {p.shape[1]} in the teacher"
            raise DscError(what, "leave the loss router out")
        p = p / p.sum(-1, keepdim=True)
        parts.append((weights * functional.kl_div(q.log(), p, reduction="none").sum(-1)).sum())
    if not parts:
        raise DscError("loss router: the models have no routers in common", "leave the loss router out")
    return torch.stack(parts).mean()


def _contrastive(student: View, teacher: View, batch: Batch, projection: Tensor, tau: float) -> Tensor:
    """InfoNCE over the texts of the batch."""
    ours, theirs = (
        functional.normalize(torch.stack([part.mean(0) for part in torch.split(hidden.float(), batch.sizes)]), dim=-1)
        for hidden in (functional.linear(student.final.float(), projection), teacher.final)
    )
    return functional.cross_entropy(ours @ theirs.T / tau, torch.arange(len(ours), device=ours.device))

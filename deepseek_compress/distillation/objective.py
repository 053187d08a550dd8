"""The loss of a batch and its gradient, a piece of the positions at a time.

Logits of all positions of a step would be the largest tensor of a training (2,048 positions x 128k tokens: 1 GB, and
as much again for each intermediate). So the head's input h is cut from the graph, the losses of each piece go back to h
and the head at once, and what has gathered at h goes back through the blocks in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.distillation.documents import Batch
from deepseek_compress.distillation.features import INSIDE, Pair, inside_loss
from deepseek_compress.distillation.losses import (
    CrossEntropy,
    Divergence,
    ForwardKl,
    HiddenStates,
    Loss,
    Router,
    Target,
    entries,
    total,
)  # fmt: skip
from deepseek_compress.distillation.teachers import Said, Teacher
from deepseek_compress.distillation.views import View, view
from deepseek_compress.models.runtime import Model

PIECE = 1 << 24  # positions x vocabulary whose logits are held at a time: 64 MB in float32


class Sums(NamedTuple):
    """Over the positions of a batch: the loss by weight, and KL, surprise and hits of each."""

    loss: float
    weight: float
    kl: float
    surprise: float
    right: int
    positions: int


@dataclass(frozen=True)
class Objective:
    """Training objective of a student."""

    losses: tuple[Loss, ...]
    temperature: float
    vocabulary: int  # tokens that both models have
    pairs: Sequence[Pair] = ()
    mixed: bool = False  # products in BF16
    checkpointing: bool = False
    joint: float = 0.0  # share of the teacher's own loss on the text, where it is trained too

    @property
    def inside(self) -> bool:
        """Whether a loss looks at more than logits."""
        return any(isinstance(loss, INSIDE) for loss in self.losses)

    def said(self, teacher: Teacher, batch: Batch) -> Said:
        """Return what the losses need of the teacher."""
        return teacher.said(batch, self._has(HiddenStates), self._has(Router))

    def backward(
        self, model: Model, batch: Batch, said: Said, projections: Mapping[str, Tensor], weight: float
    ) -> float:
        """Add the gradient of a batch, which is part of a step whose positions weigh `weight`; its part of the loss."""
        batch = batch.to(model.head.device)
        with self._products(model):
            seen = self._view(model, batch, checkpointing=self.checkpointing)
            h = seen.final.detach().requires_grad_(seen.final.requires_grad)
            loss = torch.zeros((), dtype=torch.float64, device=h.device)  # read once, since reading waits
            for rows in pieces(len(h), self.vocabulary):
                each = self._each(self._logits(model, h[rows]), said.target(rows), batch.labels[rows])
                part = (each * batch.weights[rows]).sum() / weight
                if part.requires_grad:
                    part.backward()  # type: ignore[no-untyped-call]
                loss += part.detach()
            ends: list[tuple[Tensor, Tensor | None]] = [] if h.grad is None else [(seen.final, h.grad)]
            if self.inside and said.view is not None:
                inside = inside_loss(self.losses, seen, said.view, batch, self.pairs, projections)
                inside = inside * (float(batch.weights.sum()) / weight)
                loss += inside.detach()
                ends.append((inside, None))
            if self.joint:
                loss += self._teachers_own(said, batch, weight, ends)
            ends = [end for end in ends if end[0].requires_grad]
            if ends:
                torch.autograd.backward([end[0] for end in ends], [end[1] for end in ends])
        return float(loss)

    def _teachers_own(self, said: Said, batch: Batch, weight: float, ends: list[tuple[Tensor, Tensor | None]]) -> float:
        """Return the teacher's loss on the text; its gradient at the last hidden states joins `ends`."""
        assert said.view is not None
        assert said.head is not None
        h = said.view.final.detach().requires_grad_()
        loss = 0.0
        for rows in pieces(len(h), self.vocabulary):
            logits = functional.linear(h[rows], said.head)[:, : self.vocabulary].float()
            labels = batch.labels[rows].to(logits.device)
            each = functional.cross_entropy(logits, labels, reduction="none") * batch.weights[rows].to(logits.device)
            part = self.joint * each.sum() / weight
            part.backward()  # type: ignore[no-untyped-call]
            loss += float(part.detach())
        ends.append((said.view.final, h.grad))
        return loss

    @torch.no_grad()
    def measure(self, model: Model, batch: Batch, said: Said, projections: Mapping[str, Tensor]) -> Sums:
        """Run the batch without a gradient."""
        weight, batch = float(batch.weights.sum()), batch.to(model.head.device)
        loss = kl = surprise = 0.0
        right = 0
        with self._products(model):
            seen = self._view(model, batch)
            for rows in pieces(len(seen.final), self.vocabulary):
                logits, labels = self._logits(model, seen.final[rows]), batch.labels[rows]
                target = said.target(rows)
                loss += float((self._each(logits, target, labels) * batch.weights[rows]).sum())
                kl += float(total(ForwardKl(), entries(logits, target, self.temperature)).sum())
                surprise += float(functional.cross_entropy(logits, labels, reduction="sum"))
                right += int((logits.argmax(-1) == labels).sum())
            if self.inside and said.view is not None:
                loss += weight * float(inside_loss(self.losses, seen, said.view, batch, self.pairs, projections))
        return Sums(loss, weight, kl, surprise, right, len(batch.labels))

    def _each(self, logits: Tensor, target: Target, labels: Tensor) -> Tensor:
        """Return the loss of each position (N,)."""
        out = logits.new_zeros(len(logits))
        soft = [loss for loss in self.losses if isinstance(loss, Divergence)]
        if soft:
            at = entries(logits, target, self.temperature)
            for divergence in soft:
                out = out + divergence.share * self.temperature**2 * total(divergence, at)
        for loss in self.losses:
            if isinstance(loss, CrossEntropy):
                out = out + loss.share * functional.cross_entropy(logits, labels, reduction="none")
        return out

    def _logits(self, model: Model, h: Tensor) -> Tensor:
        return functional.linear(h, model.head)[:, : self.vocabulary].float()

    def _view(self, model: Model, batch: Batch, checkpointing: bool = False) -> View:
        return view(
            model, batch, hidden=self._has(HiddenStates), routers=self._has(Router), checkpointing=checkpointing
        )

    def _has(self, kind: type[Loss]) -> bool:
        return any(isinstance(loss, kind) for loss in self.losses)

    def _products(self, model: Model) -> AbstractContextManager[object]:
        return torch.autocast(model.head.device.type, torch.bfloat16) if self.mixed else nullcontext()


def pieces(count: int, vocabulary: int) -> Iterator[slice]:
    """Of `count` positions, each with at most `PIECE` logits."""
    step = max(1, PIECE // vocabulary)
    return (slice(start, start + step) for start in range(0, count, step))

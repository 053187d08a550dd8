"""Who says what the student learns: a teacher in memory, or what one said before and is kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.distillation.documents import Batch
from deepseek_compress.distillation.losses import Target
from deepseek_compress.distillation.views import View, view
from deepseek_compress.models.runtime import Model


class Said(NamedTuple):
    """A teacher's output for a batch: its target at a slice of the positions, and its forward pass where it is here."""

    target: Callable[[slice], Target]
    view: View | None = None
    head: Tensor | None = None  # of a teacher that is trained too


class Teacher(Protocol):
    """Says what it expects at every position of a batch."""

    def said(self, batch: Batch, hidden: bool, routers: bool) -> Said:
        """`hidden`, `routers`: what the view must have."""
        ...


class LiveTeacher:
    """A teacher in memory: all of its distribution over the first `vocabulary` tokens."""

    def __init__(self, model: Model, vocabulary: int, temperature: float) -> None:
        self.model, self.vocabulary, self.temperature = model, vocabulary, temperature

    @torch.no_grad()
    def said(self, batch: Batch, hidden: bool = False, routers: bool = False) -> Said:
        """Run the model over the batch; logits are made piece by piece."""
        seen = view(self.model, batch, hidden=hidden, routers=routers)

        @torch.no_grad()
        def target(rows: slice) -> Target:
            return Target(functional.log_softmax(self._logits(seen.final[rows]) / self.temperature, dim=-1))

        return Said(target, seen)

    def _logits(self, final: Tensor) -> Tensor:
        return functional.linear(final, self.model.head)[:, : self.vocabulary].float()


class JointTeacher(LiveTeacher):
    """A teacher that is trained with the student, on the text itself and on what looks inside both."""

    PREFIX = "teacher/"  # of its weights among what is learned with the student's

    def leaves(self) -> dict[str, Tensor]:
        """Its floating-point weights by the names under which they are learned."""
        weights = self.model.weights.items()
        return {self.PREFIX + name: tensor.clone() for name, tensor in weights if tensor.is_floating_point()}

    def take(self, learned: Mapping[str, Tensor]) -> None:
        """Compute with the weights as they are now."""
        own = {name: learned.get(self.PREFIX + name, tensor) for name, tensor in self.model.weights.items()}
        self.model = Model(self.model.family, self.model.cfg, own)

    def said(self, batch: Batch, hidden: bool = False, routers: bool = False) -> Said:
        """As `LiveTeacher`; the view has a gradient where there is one, the target never has."""
        seen = view(self.model, batch, hidden=hidden, routers=routers)

        @torch.no_grad()
        def target(rows: slice) -> Target:
            return Target(functional.log_softmax(self._logits(seen.final[rows]) / self.temperature, dim=-1))

        return Said(target, seen, self.model.head)

"""Routing of a model against its reference, block by block: share of choices that changed, load of experts."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor


class Choices(TypedDict):
    """Of one block; pairs are (reference, model)."""

    changed: float  # share of the reference's (token, expert) pairs that the model does not choose
    busiest: list[float]  # share of the tokens that the most chosen expert sees
    idle: list[int]  # experts that no token chose


class ExpertChoice:
    """Counts over the tokens of a text."""

    def __init__(self, experts: int) -> None:
        self.experts = experts
        self.tokens = self.same = self.pairs = 0
        self.loads = torch.zeros(2, experts, dtype=torch.int64)

    def add(self, reference: Tensor, model: Tensor) -> None:
        """Add the experts of some tokens, integers (tokens, K) each; K may differ."""
        self.tokens += len(reference)
        self.pairs += reference.numel()
        self.same += int((reference[:, :, None] == model[:, None, :]).any(-1).sum())
        for load, chosen in zip(self.loads, (reference, model), strict=True):
            load += torch.bincount(chosen.flatten().long().cpu(), minlength=self.experts)

    def result(self) -> Choices | None:
        """Return what was found; None of no token."""
        if not self.tokens:
            return None
        return {
            "changed": 1 - self.same / self.pairs,
            "busiest": [int(load.max()) / self.tokens for load in self.loads],
            "idle": [int((load == 0).sum()) for load in self.loads],
        }

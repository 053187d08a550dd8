"""Curriculum: easy texts first (Bengio et al. 2009, Curriculum Learning). Phase i of n trains on the easiest i/n.

How hard a text is, is its length, or the mean loss of the teacher on the tokens that follow its prompt. The steps are
shared out evenly among the phases, and the order within a phase is drawn from the seed as in any training.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import BaseModel, Field
from torch.nn import functional

from deepseek_compress.distillation.documents import Document, batch_of, batches, batches_by_length
from deepseek_compress.distillation.views import view
from deepseek_compress.models.runtime import Model

TOKENS_AT_ONCE = 4096
POSITIONS = 512  # whose logits are there at a time


class Curriculum(BaseModel, frozen=True, extra="forbid"):
    """In how many phases, and what tells how hard a text is."""

    by: Literal["length", "loss"] = "loss"
    phases: int = Field(3, gt=1)


@torch.no_grad()
def teacher_loss(model: Model, documents: Sequence[Document]) -> list[float]:
    """Mean -log p of each document's tokens behind its prompt, nats."""
    found = [0.0] * len(documents)
    for group in batches_by_length([len(document.ids) for document in documents], TOKENS_AT_ONCE):
        batch = batch_of(documents, group, 0.0)
        final = view(model, batch).final
        losses = [
            functional.cross_entropy(functional.linear(h, model.head).float(), labels.to(h.device), reduction="none")
            for h, labels in zip(torch.split(final, POSITIONS), torch.split(batch.labels, POSITIONS), strict=True)
        ]
        each = torch.split(torch.cat(losses).cpu() * batch.weights, batch.sizes)
        counts = torch.split(batch.weights, batch.sizes)
        for number, loss, count in zip(group, each, counts, strict=True):
            found[number] = float(loss.sum() / count.sum().clamp(min=1))
    return found


def in_phases(
    difficulty: Sequence[float], lengths: Sequence[int], phases: int, steps: int, batch_tokens: int, seed: int
) -> Iterator[list[int]]:
    """Yield the documents of each of `steps` steps."""
    order = sorted(range(len(lengths)), key=lambda number: (difficulty[number], number))
    for phase in range(phases):
        pool = sorted(order[: -(-len(order) * (phase + 1) // phases)])
        count = steps * (phase + 1) // phases - steps * phase // phases
        drawn = batches([lengths[number] for number in pool], batch_tokens, seed + phase)
        yield from ([pool[i] for i in numbers] for numbers in itertools.islice(drawn, count))

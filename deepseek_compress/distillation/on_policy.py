"""On-policy text: what the student itself writes after a prompt, for the teacher to judge (GKD, Agarwal et al. 2024,
arXiv 2306.13649, algorithm 1).

A student trained on a text alone never sees where its own mistakes lead. In a share of the steps the prompts of that
step's documents are continued by the student as it is then, at temperature 1, and the divergence is taken there; no
gradient goes through the draws. A document without a prompt is continued after its first quarter.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.checkpoint.reader import check_finite
from deepseek_compress.distillation.documents import Document
from deepseek_compress.models.runtime import Model

GIVEN = 4  # of a document without a prompt, a part in so many is given
AT_ONCE = 64  # documents that are continued together


class Drawn:
    """Draws the next token from softmax(logits / temperature); the same seed draws the same."""

    def __init__(self, temperature: float, seed: int) -> None:
        self.temperature = temperature
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, logits: Tensor, rows: Sequence[int] = ()) -> Tensor:
        """(B, vocabulary) -> int64 (B,); all `rows` draw from one stream."""
        check_finite("logits of the model", logits)
        p = functional.softmax(logits.float().cpu() / self.temperature, dim=-1)
        return torch.multinomial(p, 1, generator=self._generator)[:, 0].to(logits.device)


def chosen(share: float, seed: int, step: int) -> bool:
    """Whether a step is on the student's own text."""
    return random.Random(f"on-policy/{seed}/{step}").random() < share


def own_text(student: Model, documents: Sequence[Document], seed: int) -> list[Document]:
    """Each document with the student's words behind its prompt, at most as many as it had."""
    prompts = [document.ids[: document.prompt or -(-len(document.ids) // GIVEN)] for document in documents]
    limit = max(1, *(len(document.ids) - len(prompt) for document, prompt in zip(documents, prompts, strict=True)))
    written = student.generate(prompts, limit, None, AT_ONCE, Drawn(1.0, seed))
    end = list(student.cfg.eos_token_ids[:1])
    return [
        Document([*prompt, *ids, *(end if len(ids) < limit else [])][: len(document.ids) + 1], document.prompt)
        for document, prompt, ids in zip(documents, prompts, written, strict=True)
    ]

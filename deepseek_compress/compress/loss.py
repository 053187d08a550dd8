"""Measure what a compression cost on its own calibration text: KL to the original, and perplexity before and after.

The compressed model's side comes out of the block loop that solved it, so only its head is still to be computed; the
original's is stored with it where the loop is paired, and else takes a run over the few samples that are judged. The
methods have seen this text, so other text costs more: it is a lower bound, and enough to warn by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_compress.compress.job import Job
from deepseek_compress.models import Architecture, ModelConfig
from deepseek_compress.streaming import head
from deepseek_compress.streaming.block_run import PlainRun
from deepseek_compress.streaming.head import HeadInput, scores
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.streaming.loop import Progress
from deepseek_compress.streaming.predict import predictions
from deepseek_compress.workers import open_pool

JUDGED = 4096  # tokens: tells a KL to a few hundredths of itself, for an eighth of the usual text's forward pass
WARN_KL = 0.5  # nats a token from the original, above which a result comes with a warning


class Loss(NamedTuple):
    """Means over the `tokens` that are predicted."""

    tokens: int
    kl: float  # nats
    before: float  # perplexity of the original
    after: float

    def notes(self) -> Iterator[str]:
        """Yield the figures in a line, and a warning where they are high."""
        perplexity = f"perplexity {self.before:.2f} -> {self.after:.2f}"
        yield f"on {self.tokens} tokens of the calibration text: KL {self.kl:.4f} to the original, {perplexity}"
        if self.kl > WARN_KL:
            what = f"warning: KL {self.kl:.2f} is above {WARN_KL}: the model may answer nonsense"
            yield f"{what}; train it under its zeros: dsc run sparse24-recovered"

    def card(self) -> str:
        """Return the same for the model card, in Markdown."""
        head = "| tokens | KL to the original (nats) | perplexity before | after |\n|---:|---:|---:|---:|"
        row = f"| {self.tokens} | {self.kl:.4f} | {self.before:.2f} | {self.after:.2f} |"
        warning = (
            ""
            if self.kl <= WARN_KL
            else f"\n\n**This is far from the original (above {WARN_KL}): it may answer nonsense until it is trained.**"
        )
        note = "On the text it was calibrated with; other text costs more."
        return f"## What it cost\n\n{note}\n\n{head}\n{row}{warning}\n"


def cost(cfg: ModelConfig) -> int:
    """Bytes that the head takes for each model: as it is stored, a part of it in float32, and a piece of the logits."""
    size = cfg.vocab_size * cfg.hidden_size
    return 4 * size + 2 * (4 * min(size, head.WEIGHTS) + 24 * head.LOGITS)


def judged(samples: int, length: int) -> int:
    """Return how many of the `samples` of calibration text are judged."""
    return min(samples, max(1, JUDGED // length))


def measure(job: Job, tokens: Tensor, changed: HiddenStore, progress: Progress) -> Loss:
    """Return the loss over tokens int64 (samples, length) of the model whose last block gave `changed` for them.

    In a paired job, `changed` has the original's output of a sample after the compressed model's.
    """
    samples, length = tokens.shape
    starts = [length * sample * (2 if job.paired else 1) for sample in range(samples)]
    places = [start + position for start in starts for position in range(length - 1)]
    weight = job.source.read(job.architecture.head, None, job.architecture.device)
    ours = _head(job.architecture, changed, places, weight)
    with _original(job, tokens, changed, places, weight, progress) as theirs:
        found = scores([theirs, ours], tokens[:, 1:].flatten())
    kl, before, after = (float(values.mean()) for values in (found.kl[1], found.nll[0], found.nll[1]))
    return Loss(len(places), kl, math.exp(min(before, 700.0)), math.exp(min(after, 700.0)))


@contextmanager
def _original(
    job: Job, tokens: Tensor, changed: HiddenStore, places: list[int], weight: Tensor, progress: Progress
) -> Iterator[HeadInput]:
    """Give what enters the original's head at `places`."""
    if job.paired:
        yield _head(job.architecture, changed, [place + tokens.shape[1] for place in places], weight)
        return
    folder = job.work / "original"
    folder.mkdir(exist_ok=True)
    runs = (PlainRun(job.architecture, folder, exact=True),)
    with (
        open_pool(runs, 1) as pool,
        predictions(runs, tokens, places, folder, pool, progress) as (heads, _),
    ):
        yield heads[0]


def _head(architecture: Architecture, states: HiddenStore, places: list[int], weight: Tensor) -> HeadInput:
    """Return the head's input from the last block's output, normed when it is read."""
    top = architecture.top()

    @torch.no_grad()
    def rows(start: int, count: int) -> Tensor:
        hidden = states.gather(places[start : start + count]).to(architecture.device)
        return architecture.final_hidden(top, hidden[None])[0]

    return HeadInput(rows, weight)

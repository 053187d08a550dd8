"""What the teacher said: its k most likely tokens at every position of the training text, computed once and kept.

Kept in four bytes a token and place (id int16 or int32, log-probability float16), so that a student of many passes
needs the teacher once. Documents stand one by one; prompts weigh less than what the model is to write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_compress import limits
from deepseek_compress.calibration.settings import Source
from deepseek_compress.calibration.sources import Sample
from deepseek_compress.calibration.tokens import by_share
from deepseek_compress.distillation.losses import Target
from deepseek_compress.errors import DscError
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import Tokenizer

TOKENS_AT_ONCE = 8192  # of a teacher's forward pass


class Document(NamedTuple):
    """Token ids of one document, and how many of them are its prompt."""

    ids: list[int]
    prompt: int


class Trace(NamedTuple):
    """One document with the teacher's opinion of every position but the last."""

    ids: Tensor  # int64 (T,)
    weights: Tensor  # float32 (T - 1,)
    top_ids: Tensor  # int16 or int32 (T - 1, k)
    top_log_probs: Tensor  # float16 (T - 1, k)


def read_documents(sources: Sequence[Source], tokenizer: Tokenizer, count: int, length: int) -> list[Document]:
    """The first `count` documents of all sources, in turn or by share, cut to `length` tokens; fewer is an error."""
    found: list[Document] = []
    for _, sample, ids in by_share(sources, tokenizer):
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            if len(piece) > 1:
                found.append(Document(piece, 0 if start else min(_prompt(sample, ids, tokenizer), len(piece))))
        if len(found) >= count:
            return found[:count]
    what = f"{', '.join(source.path for source in sources)}: {len(found)} documents of training text, {count} asked for"
    raise DscError(what, f"give more text, or set distill.documents: {len(found)}")


def _prompt(sample: Sample, ids: list[int], tokenizer: Tokenizer) -> int:
    """How many leading ids belong to what the model is asked; 0 for plain text."""
    if len(sample.messages) < 2:
        return 0
    text = tokenizer.chat(sample.messages[:-1], answer_next=True)
    asked = next(tokenizer.encoded(text, limits.PIECE, special=not tokenizer.has_chat_template), [])
    while asked and ids[: len(asked)] != asked:  # a tokenizer may join the last prompt token with what follows
        asked = asked[:-1]
    return len(asked)


def record(
    teacher: Model,
    documents: Sequence[Document],
    top_k: int,
    prompt_weight: float,
    progress: Callable[[int, int, str], None],
) -> list[Trace]:
    """The teacher's traces of `documents`, in their order."""
    small = torch.int16 if teacher.cfg.vocab_size <= 1 << 15 else torch.int32
    top_k = min(top_k, teacher.cfg.vocab_size)
    traces: dict[int, Trace] = {}
    for chosen in batches_by_length([len(document.ids) for document in documents], TOKENS_AT_ONCE):
        ids = padded([documents[index].ids for index in chosen])
        with torch.no_grad():
            best = torch.log_softmax(teacher(ids), dim=-1).topk(top_k, dim=-1)
        for row, index in enumerate(chosen):
            document = documents[index]
            size = len(document.ids) - 1
            weights = torch.ones(size)
            weights[: max(0, document.prompt - 1)] = prompt_weight
            top_ids, top = best.indices[row, :size].to(small), best.values[row, :size].half()
            traces[index] = Trace(ids[row, : size + 1].clone(), weights, top_ids, top)
        progress(len(traces), len(documents), "teacher's distribution")
    return [traces[index] for index in range(len(documents))]


def target_of(traces: Sequence[Trace]) -> tuple[Tensor, Tensor, Target]:
    """A batch: tokens int64 (B, T) padded at the right, the N real positions among B * (T - 1), and their target."""
    tokens = padded([trace.ids for trace in traces])
    width = tokens.shape[1] - 1
    places = torch.cat([row * width + torch.arange(len(trace.weights)) for row, trace in enumerate(traces)])
    return (
        tokens,
        places,
        Target(
            ids=torch.cat([trace.top_ids for trace in traces]).long(),
            log_probs=torch.cat([trace.top_log_probs for trace in traces]).float(),
            labels=torch.cat([trace.ids[1:] for trace in traces]),
            weights=torch.cat([trace.weights for trace in traces]),
        ),
    )


def batches_by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Indices in batches of similar length, each at most `tokens` with its padding (or one document)."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if found and (len(found[-1]) + 1) * lengths[index] <= tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def padded(rows: Sequence[Sequence[int] | Tensor]) -> Tensor:
    """int64 (B, T), zeros at the right: causal attention never sees them from a real position."""
    width = max(len(row) for row in rows)
    out = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.as_tensor(row)
    return out

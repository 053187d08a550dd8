"""The text of a training: documents one by one, batches of similar length, prompts that weigh less than answers."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_compress.calibration.settings import Source
from deepseek_compress.calibration.sources import Sample
from deepseek_compress.calibration.tokens import by_share
from deepseek_compress.errors import DscError
from deepseek_compress.models.tokenizer import Tokenizer


class Document(NamedTuple):
    """Token ids of one document, and how many of them are its prompt."""

    ids: list[int]
    prompt: int


class Batch(NamedTuple):
    """Documents that run together, and the N positions among them where a token is predicted."""

    numbers: list[int]  # of the documents
    sizes: list[int]  # positions of each document
    tokens: Tensor  # int64 (B, T), padded at the right
    places: Tensor  # int64 (N,), of the positions among B * (T - 1)
    labels: Tensor  # int64 (N,), the token that follows
    weights: Tensor  # float32 (N,), share of each position in the mean

    def to(self, device: torch.device | str) -> Batch:
        """Return the same with its tensors on `device`."""
        tensors = (self.tokens, self.places, self.labels, self.weights)
        return Batch(self.numbers, self.sizes, *(tensor.to(device) for tensor in tensors))


def read_documents(
    sources: Sequence[Source], tokenizer: Tokenizer, length: int, count: int | None, tokens: int | None = None
) -> list[Document]:
    """Documents of all sources, in turn or by share, cut to `length` tokens.

    The first `count`, where fewer are an error; else as many as have `tokens` tokens together, or all there are.
    """
    found: list[Document] = []
    total = 0
    for _, sample, ids in by_share(sources, tokenizer):
        for start in range(0, len(ids), length):
            piece = ids[start : start + length]
            if len(piece) > 1:
                found.append(Document(piece, 0 if start else min(_prompt(sample, ids, tokenizer), len(piece))))
                total += len(piece)
        if len(found) >= count if count is not None else tokens is not None and total >= tokens:
            return found[:count]
    named = ", ".join(source.path for source in sources)
    if count is not None:
        what = f"{named}: {len(found)} documents of training text, {count} asked for"
        raise DscError(what, f"give more text, or set distill.documents: {len(found)}")
    if len(found) < 2:
        raise DscError(f"{named}: {len(found)} documents of training text", "give at least two")
    return found


def _prompt(sample: Sample, ids: list[int], tokenizer: Tokenizer) -> int:
    """Count the leading ids that belong to the prompt; 0 for plain text."""
    if len(sample.messages) < 2:
        return 0
    text = tokenizer.chat(sample.messages[:-1], answer_next=True)
    asked = tokenizer.encode(text, special=not tokenizer.has_chat_template)
    while asked and ids[: len(asked)] != asked:  # a tokenizer may join the last prompt token with what follows
        asked = asked[:-1]
    return len(asked)


def batch_of(documents: Sequence[Document], numbers: Sequence[int], prompt_weight: float) -> Batch:
    """Return the documents `numbers` as one batch; a position inside a prompt weighs `prompt_weight`."""
    chosen = [documents[number] for number in numbers]
    tokens = padded([document.ids for document in chosen])
    width = tokens.shape[1] - 1
    sizes = [len(document.ids) - 1 for document in chosen]
    weights = torch.ones(sum(sizes))
    start = 0
    for document, size in zip(chosen, sizes, strict=True):
        weights[start : start + max(0, document.prompt - 1)] = prompt_weight
        start += size
    return Batch(
        list(numbers),
        sizes,
        tokens,
        torch.cat([row * width + torch.arange(size) for row, size in enumerate(sizes)]),
        torch.cat([torch.tensor(document.ids[1:]) for document in chosen]),
        weights,
    )


def batches_by_length(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Return indices in batches of similar length, each at most `tokens` with its padding (or one document)."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if found and (len(found[-1]) + 1) * lengths[index] <= tokens:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def batches(lengths: Sequence[int], batch_tokens: int, seed: int) -> Iterator[list[int]]:
    """Yield the documents of each step, without end: passes over all of them, each in an order drawn anew from
    `seed`."""
    rng = random.Random(seed)
    while True:
        order = list(range(len(lengths)))
        rng.shuffle(order)  # ties in length fall differently in each pass
        groups = batches_by_length([lengths[index] for index in order], batch_tokens)
        rng.shuffle(groups)
        yield from ([order[index] for index in group] for group in groups)


def steps_for(lengths: Sequence[int], batch_tokens: int, seed: int, tokens: int) -> int:
    """Return the least number of steps that train on `tokens` tokens."""
    order = batches(lengths, batch_tokens, seed)
    total = steps = 0
    while total < tokens:
        total += sum(lengths[index] for index in next(order))
        steps += 1
    return steps


def padded(rows: Sequence[Sequence[int] | Tensor]) -> Tensor:
    """int64 (B, T), zeros at the right: causal attention never sees them from a real position."""
    width = max(len(row) for row in rows)
    out = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.as_tensor(row)
    return out

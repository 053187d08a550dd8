"""Who answers, a batch at a time, and what it answered, on disk as it comes: a stopped evaluation goes on from there.

Requests are sorted by length and cut into batches once; a batch is answered as a whole and written down as a whole, so
that a resumed evaluation has the batches, and with them the answers, of one that was not stopped.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek_compress.evaluation.process import Attempt
from deepseek_compress.generation.backends import Floats
from deepseek_compress.generation.backends.graph import GraphBackend, GraphModel
from deepseek_compress.generation.sampling import Sampler, Sampling
from deepseek_compress.generation.speaker import Local, Speaker

if TYPE_CHECKING:
    from deepseek_compress.models.runtime import Model
    from deepseek_compress.models.tokenizer import Tokenizer

TOKENS = 1 << 14  # new tokens of a batch at most, and these multiplications on a processor, which has some 2 minutes'
WORK, LEAST = 1 << 40, 16  # work in them: both bound what a stop can lose; below so many requests a batch gets slow
BATCH = 256  # requests of a batch
TOGETHER = 8  # requests that a server is sent at once


class Request(NamedTuple):
    """A prompt as tokens and as text or messages, and how it is answered."""

    ids: Sequence[int]
    asked: str | Sequence[dict[str, str]]
    limit: int
    stop: str | None
    sampling: Sampling


class Answerer(ABC):
    """Answers a batch of requests."""

    name: str
    weights = 0  # numbers that a processor multiplies for each token, roughly; 0 where something else computes

    @abstractmethod
    def __call__(self, requests: Sequence[Request]) -> list[Attempt]:
        """Return an attempt a request, in their order."""


class Answers:
    """The answers of one model, kept in `file`; None: nowhere."""

    def __init__(self, file: Path | None) -> None:
        self.file = file

    def collect(
        self,
        answerer: Answerer,
        requests: Sequence[Request],
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Attempt]:
        """Return the answer to each request; those that the file has are not asked for again."""
        found = self._read(requests)
        progress(len(found), len(requests))
        for batch in batches(requests, answerer.weights):
            new = [index for index in batch if index not in found]  # all, or none, where nobody asked for fewer before
            if not new:
                continue
            attempts = answerer([requests[index] for index in new])
            found |= dict(zip(new, attempts, strict=True))
            self._append([{"index": index, **found[index]._asdict()} for index in new])
            progress(len(found), len(requests))
        return [found[index] for index in range(len(requests))]

    def _read(self, requests: Sequence[Request]) -> dict[int, Attempt]:
        """Whole lines only: a line that a kill left unfinished is cut off the file."""
        if self.file is None or not self.file.is_file():
            return {}
        content = self.file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with self.file.open("r+b") as file:
                file.truncate(len(whole))
        rows = [row for line in whole.splitlines() for row in json.loads(line)]
        known = (row for row in rows if row["index"] < len(requests))
        return {row["index"]: Attempt(row["text"], row["tokens"], row["cut"]) for row in known}

    def _append(self, rows: Sequence[dict[str, object]]) -> None:
        if self.file is None:
            return
        with self.file.open("ab") as file:
            file.write(json.dumps(rows, ensure_ascii=True).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def batches(requests: Sequence[Request], weights: int = 0) -> list[list[int]]:
    """Return indices of requests of similar length that are answered together, by a model of so many `weights`."""
    order = sorted(range(len(requests)), key=lambda index: len(requests[index].ids))
    longest = max((request.limit for request in requests), default=1)
    size = max(1, min(BATCH, TOKENS // longest))
    if weights:
        size = min(size, max(LEAST, WORK // (weights * longest)))
    return [order[start : start + size] for start in range(0, len(order), size)]


class FromModel(Answerer):
    """A checkpoint in our own runtime: one batch with one cache."""

    name = "runtime"

    def __init__(self, model: Model, tokenizer: Tokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer
        if model.head.device.type == "cpu":
            self.weights = sum(tensor.numel() for tensor in model.weights.values())

    def __call__(self, requests: Sequence[Request]) -> list[Attempt]:
        """Greedy where the first request is."""
        limit, ends = requests[0].limit, self.tokenizer.eos_ids or None
        ids = [request.ids for request in requests]
        more: dict[str, Any] = {}
        if requests[0].sampling.temperature:
            more["choose"] = Choose([request.sampling for request in requests])
        if requests[0].stop:
            more["ended"] = Stop(self.tokenizer, requests[0].stop)
        found = self.model.generate(ids, limit, ends, batch_size=len(requests), **more)
        return [Attempt(self.tokenizer.decode(one, skip_special=False), len(one), len(one) >= limit) for one in found]


class FromGraph(Answerer):
    """A graph that takes a batch: prompts are padded at the left and masked."""

    def __init__(self, backend: GraphBackend, tokenizer: Tokenizer) -> None:
        self.backend, self.tokenizer = backend, tokenizer
        self.name = backend.name

    def __call__(self, requests: Sequence[Request]) -> list[Attempt]:
        """All rows go on until the last has ended: the cache of a graph keeps its rows."""
        model = GraphModel(self.backend.model.runner)
        limit, ends = requests[0].limit, set(self.tokenizer.eos_ids)
        logits = self._prefill(model, [request.ids for request in requests])
        choose = [Sampler(request.sampling) for request in requests]
        stop = Stop(self.tokenizer, requests[0].stop) if requests[0].stop else None
        out: list[list[int]] = [[] for _ in requests]
        going = [True] * len(requests)
        for step in range(limit):
            tokens = [pick(row) for pick, row in zip(choose, logits, strict=True)]
            for row, token in enumerate(tokens):
                going[row] = going[row] and token not in ends
                if going[row]:
                    out[row].append(token)
                    going[row] = stop is None or not stop(out[row])
            if not any(going) or step + 1 == limit:
                break
            logits = model.step(np.array(tokens, np.int64)[:, None])[:, -1]
        return [Attempt(self.tokenizer.decode(ids, skip_special=False), len(ids), len(ids) >= limit) for ids in out]

    def _prefill(self, model: GraphModel, prompts: Sequence[Sequence[int]]) -> Floats:
        """Logits (B, vocabulary) after each prompt."""
        width = max(map(len, prompts))
        tokens = np.array([[0] * (width - len(ids)) + list(ids) for ids in prompts], np.int64)
        mask = np.array([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], np.int64)
        model.start(len(prompts))
        for start in range(0, width, self.backend.chunk):
            piece = slice(start, start + self.backend.chunk)
            logits = model.step(tokens[:, piece], mask[:, piece])
        last: Floats = logits[:, -1]
        return last


class FromSpeaker(Answerer):
    """Answerer for a backend that takes one prompt at a time, or a server, which takes several."""

    def __init__(self, speaker: Speaker, name: str) -> None:
        self.speaker, self.name = speaker, name
        self.together = 1 if isinstance(speaker, Local) else TOGETHER

    def __call__(self, requests: Sequence[Request]) -> list[Attempt]:
        """In the order of the requests, whatever order a server answers in."""
        with ThreadPoolExecutor(self.together) as pool:
            return list(pool.map(self._one, requests))

    def _one(self, request: Request) -> Attempt:
        answer, pieces = self.speaker.reply(request.asked, request.sampling, request.limit)
        text = ""
        for piece in pieces:
            text += piece.text
            if request.stop and request.stop in text:
                break
        return Attempt(text, answer.tokens, answer.stopped == "length")


def answerer_of(speaker: Speaker, name: str) -> Answerer:
    """Return the fastest way to have `speaker` answer many requests."""
    if isinstance(speaker, Local) and isinstance(speaker.backend, GraphBackend):
        return FromGraph(speaker.backend, speaker.tokenizer)
    return FromSpeaker(speaker, name)


class Choose:
    """Draws the next token of each row of a batch from the row's own stream."""

    def __init__(self, settings: Sequence[Sampling]) -> None:
        self._samplers = [Sampler(sampling) for sampling in settings]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """logits (B, vocabulary) of the requests `rows` -> tokens (B,)."""
        found = [self._samplers[row](part) for row, part in zip(rows, logits.cpu().numpy(), strict=True)]
        return torch.tensor(found, device=logits.device)


class Stop:
    """Ends a row where a text appears in what it wrote last."""

    def __init__(self, tokenizer: Tokenizer, text: str) -> None:
        self._tokenizer, self._text = tokenizer, text

    def __call__(self, ids: Sequence[int]) -> bool:
        """Whether the last tokens hold the text."""
        return self._text in self._tokenizer.decode(ids[-len(self._text) - 4 :], skip_special=False)

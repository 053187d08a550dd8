"""Record what a teacher says of a text, once: its words at every position go into a cache, shard by shard.

Where the teacher's last hidden states come from is one small interface, `HeadInputs`: from a model in memory here; a
teacher that does not fit gives them from its blocks one by one. The draws of a document follow from the seed and its
number alone, so that neither batches nor an interruption change what is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import torch
from pydantic import BaseModel, Field
from torch import Tensor
from torch.nn import functional

from deepseek_compress import provenance
from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.distillation import words
from deepseek_compress.distillation.cache import CacheWriter
from deepseek_compress.distillation.documents import Batch, Document, batch_of, batches_by_length
from deepseek_compress.distillation.objective import pieces
from deepseek_compress.distillation.server import Server
from deepseek_compress.distillation.views import view
from deepseek_compress.distillation.words import Words
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import Tokenizer
from deepseek_compress.streaming.loop import Progress

TOKENS_AT_ONCE = 4096  # of a forward pass
SHARD_TOKENS = 1 << 15  # of a shard: about 3 MB at the default
SMALL = 1024  # tokens of a vocabulary that is kept whole


class Settings(NamedTuple):
    """Which part of each distribution is kept."""

    form: str  # sampled, top_k or exact
    entries: int  # of a position
    temperature: float
    vocabulary: int  # first tokens of the teacher's that count: those of its tokenizer
    seed: int


class HeadInputs(Protocol):
    """A teacher's last hidden states."""

    head: Tensor  # (vocabulary, hidden)

    def batches(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """For each batch the input of the head at its N positions: (N, hidden)."""
        ...


class ResidentInputs:
    """Those of a model in memory."""

    def __init__(self, model: Model) -> None:
        self.model, self.head = model, model.head

    @torch.no_grad()
    def batches(self, batches: Sequence[Batch]) -> Iterator[Tensor]:
        """One forward pass a batch."""
        for batch in batches:
            yield view(self.model, batch).final


class Speaker(Protocol):
    """Says its words of documents; `first` is the number of the first of them in the text."""

    def words(self, documents: Sequence[Document], first: int) -> Words:
        """Of all positions of the documents, in order (P, n)."""
        ...


class ModelSpeaker:
    """A teacher whose hidden states are at hand."""

    def __init__(self, inputs: HeadInputs, settings: Settings) -> None:
        self.inputs, self.settings = inputs, settings

    @torch.no_grad()
    def words(self, documents: Sequence[Document], first: int) -> Words:
        """See `Speaker`; documents of similar length run together."""
        groups = batches_by_length([len(document.ids) for document in documents], TOKENS_AT_ONCE)
        prepared = [batch_of(documents, group, 1.0).to(self.inputs.head.device) for group in groups]
        found: dict[int, Words] = {}
        for batch, final in zip(prepared, self.inputs.batches(prepared), strict=True):
            draws = torch.cat([self._draws(first + number, len(documents[number].ids) - 1) for number in batch.numbers])
            draws = draws.to(final.device)
            rows_of = pieces(len(final), len(self.inputs.head))
            said = [part.cpu() for part in _joined([self._words(final[rows], draws[rows]) for rows in rows_of])]
            parts = zip(*(torch.split(part, batch.sizes) for part in said), strict=True)
            found |= {number: Words(*part) for number, part in zip(batch.numbers, parts, strict=True)}
        return _joined([found[number] for number in range(len(documents))])

    def _words(self, final: Tensor, draws: Tensor) -> Words:
        settings = self.settings
        logits = functional.linear(final, self.inputs.head)[:, : settings.vocabulary].float()
        log_probs = functional.log_softmax(logits / settings.temperature, dim=-1)
        if settings.form == "sampled":
            return words.sampled(log_probs, settings.entries, draws)
        if settings.form == "top_k":
            return words.top_k(log_probs, settings.entries)
        none = torch.zeros(len(log_probs), 0, dtype=torch.long, device=log_probs.device)
        return Words(none, log_probs, words.whole(log_probs, log_probs.shape[-1]))

    def _draws(self, document: int, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.settings.seed * 1_000_003 + document)
        return torch.rand(count, generator=generator, dtype=torch.float64)


def record(
    speaker: Speaker,
    documents: Sequence[Document],
    settings: Settings,
    folder: Path,
    identity: dict[str, Any],
    progress: Progress,
) -> None:
    """Write the cache of `documents` into `folder`, after the shards of it that are there."""
    writer = CacheWriter(folder, {**settings._asdict(), **identity})
    while writer.documents < len(documents):
        first = last = writer.documents
        tokens = 0
        while last < len(documents) and tokens < SHARD_TOKENS:
            tokens, last = tokens + len(documents[last].ids), last + 1
        chosen = documents[first:last]
        writer.add(chosen, speaker.words(chosen, first), settings.vocabulary, settings.form)
        progress(last, len(documents), "teacher's words")
    total = sum(shard["tokens"] for shard in writer.shards)
    size = sum(shard["bytes"] for shard in writer.shards)
    writer.finish({"documents": writer.documents, "tokens": total, "bytes_a_token": round(size / total, 1)})


def _joined(parts: Sequence[Words]) -> Words:
    return Words(*(torch.cat(values) for values in zip(*parts, strict=True)))


class Kept(BaseModel, frozen=True, extra="forbid"):
    """The part of each distribution that a cache holds."""

    form: Literal["auto", "sampled", "top_k", "exact"] = "auto"  # auto: all of a small vocabulary, else sampled
    count: int = Field(default=22, gt=0, le=255)  # entries: 22 of 3 + 2 bytes and the text make 115 bytes a token

    def settings(self, vocabulary: int, temperature: float, seed: int) -> Settings:
        """For a teacher with so many tokens."""
        form = self.form if self.form != "auto" else "exact" if vocabulary <= SMALL else "sampled"
        count = vocabulary if form == "exact" else min(self.count, vocabulary)
        return Settings(form, count, temperature, vocabulary, seed)


def text_digest(documents: Sequence[Document]) -> str:
    """SHA-256 of the ids and prompts of a text."""
    return provenance.digest([[document.ids, document.prompt] for document in documents])


def record_model(
    teacher: Checkpoint,
    tokenizer: Tokenizer,
    documents: Sequence[Document],
    kept: Kept,
    temperature: float,
    folder: Path,
    seed: int,
    progress: Progress,
    device: str = "cpu",
) -> None:
    """Record a checkpoint that fits in memory. The ids that no token of the tokenizer has are left out."""
    model = Model.load(teacher, device=device)
    settings = kept.settings(min(model.cfg.vocab_size, tokenizer.vocab_size), temperature, seed)
    identity = {
        "teacher": {"name": teacher.path.resolve().name, "fingerprint": provenance.fingerprint(teacher)},
        "tokenizer": tokenizer.digest,
        "text": text_digest(documents),
        "versions": provenance.versions(),
        "threads": torch.get_num_threads(),
        **({} if device == "cpu" else {"device": device}),
    }
    record(ModelSpeaker(ResidentInputs(model), settings), documents, settings, folder, identity, progress)


def record_server(
    server: Server, tokenizer: Tokenizer, documents: Sequence[Document], folder: Path, progress: Progress
) -> float:
    """Record a teacher behind a server; the share of its probability that its likeliest tokens have."""
    settings = Settings("top_k", server.count, 1.0, tokenizer.vocab_size, 0)
    identity = {
        "teacher": {"name": server.model, "server": server.url},
        "tokenizer": tokenizer.digest,
        "text": text_digest(documents),
    }
    record(server, documents, settings, folder, identity, progress)
    return server.mass / max(1, server.positions)

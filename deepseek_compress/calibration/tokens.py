"""Calibration text to token windows of equal length.

Without shares the documents of all sources come in turn, one after the other, and the stream is cut. With shares each
window comes from one source: by the method of largest remainders source i gets floor or ceil of share_i * samples
windows, so its tokens meet its share within one window; the windows of all sources are spread evenly.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress import limits
from deepseek_compress.calibration.settings import Calibration, Source
from deepseek_compress.calibration.sources import Sample, files_of, read_samples
from deepseek_compress.checkpoint.verified import hash_of
from deepseek_compress.errors import DscError
from deepseek_compress.models.tokenizer import Tokenizer

Item = TypeVar("Item")


def digest_of(tokens: Tensor) -> str:
    """SHA-256 of token ids, hexadecimal."""
    return hashlib.sha256(tokens.numpy().tobytes()).hexdigest()


class Windows(NamedTuple):
    """Calibration text as the model reads it."""

    tokens: Tensor  # int64 (samples, length)
    taken: Tensor  # int64 (samples, sources): how many tokens of each window came from each source

    def take(self, chosen: Sequence[int]) -> Windows:
        """Return the windows `chosen`, in that order."""
        return Windows(self.tokens[chosen], self.taken[chosen])


class Document(NamedTuple):
    """One document of the source with this number."""

    source: int
    sample: Sample
    ids: list[int]


def read_windows(wanted: Calibration, tokenizer: Tokenizer) -> Windows:
    """`wanted.samples` windows of `wanted.length` tokens. Reads no more than it needs.

    A document is ended by the model's end token; windows cross documents, as in pre-training. Raises DscError when the
    text is too short.
    """
    sources, samples, length = wanted.sources, wanted.samples, wanted.length
    if sources[0].share is None:
        return _windows(sources, tokenizer, samples, length)
    counts = apportion([source.share or 0.0 for source in sources], samples)
    parts = {i: iter(_windows([sources[i]], tokenizer, n, length).tokens) for i, n in enumerate(counts) if n}
    order = spread(counts)
    taken = functional.one_hot(torch.tensor(order), len(sources)) * length
    return Windows(torch.stack([next(parts[source]) for source in order]), taken)


def calibration_tokens(sources: Sequence[str | Path], tokenizer: Tokenizer, samples: int, length: int) -> Tensor:
    """Return the tokens of `read_windows`: int64 (samples, length)."""
    named = tuple(Source(path=str(source)) for source in sources)
    return read_windows(Calibration(sources=named, samples=samples, length=length), tokenizer).tokens


def facts(wanted: Calibration, windows: Windows) -> dict[str, Any]:
    """For the manifest: what was asked for, and each source with the hash of its files and what was taken of it."""
    taken = zip(source_facts(wanted), windows.taken.sum(0).tolist(), strict=True)
    return {**wanted.document(), "sources": [{**source, "tokens": tokens} for source, tokens in taken]}


def source_facts(wanted: Calibration) -> list[dict[str, Any]]:
    """Name, hash of the files and share of each source."""
    return [
        {
            "name": source.name,
            "files": {file.name: hash_of(file) for file in files_of(source.path)},
            "share": source.share,
        }
        for source in wanted.sources
    ]


def apportion(shares: Sequence[float], count: int, most: Sequence[int] | None = None) -> list[int]:
    """`count` in whole parts by `shares`: the method of largest remainders (Hamilton). Ties go to the earlier.

    `most`: what there is of each, the parts of a larger count. By this method a part of it may be smaller than the one
    of `count` (the Alabama paradox); then the next remainder gets it.
    """
    exact = [share / math.fsum(shares) * count for share in shares]
    parts = [math.floor(value) for value in exact]
    rest = sorted(range(len(parts)), key=lambda i: (parts[i] - exact[i], i))
    while sum(parts) < count:
        for i in rest:
            if sum(parts) < count and (most is None or parts[i] < most[i]):
                parts[i] += 1
    return parts


def spread(counts: Sequence[int]) -> list[int]:
    """Each i `counts[i]` times, evenly: the next is the one whose next middle, (done + 1/2) / count, comes first."""
    return [i for _, i in sorted(((2 * n + 1) / count, i) for i, count in enumerate(counts) for n in range(count))]


def _windows(sources: Sequence[Source], tokenizer: Tokenizer, samples: int, length: int) -> Windows:
    """One stream of the documents of all `sources` in turn, cut."""
    wanted = samples * length
    ids: list[int] = []
    origin: list[int] = []  # of each token
    for document in in_turn(sources, tokenizer):
        ids += document.ids
        origin += [document.source] * len(document.ids)
        if len(ids) >= wanted:
            break
    else:
        named = ", ".join(source.path for source in sources)
        fix = f"give more text, or set samples: {len(ids) // length}" if len(ids) >= length else "give more text"
        raise DscError(f"{named}: {len(ids)} tokens of calibration text, {samples} x {length} asked for", fix)
    tokens, places = (torch.tensor(found[:wanted]).view(samples, length) for found in (ids, origin))
    return Windows(tokens, torch.stack([(places == i).sum(1) for i in range(len(sources))], dim=1))


def in_turn(sources: Sequence[Source], tokenizer: Tokenizer) -> Iterator[Document]:
    """One document of each source in turn, until all are used up."""
    return interleave([_documents(i, source, tokenizer) for i, source in enumerate(sources)])


def by_share(sources: Sequence[Source], tokenizer: Tokenizer) -> Iterator[Document]:
    """Yield documents, the next from the source furthest below its share of tokens; without shares: in turn."""
    if sources[0].share is None:
        yield from in_turn(sources, tokenizer)
        return
    streams = {i: _documents(i, source, tokenizer) for i, source in enumerate(sources)}
    full = dict.fromkeys(streams, 0.0)  # tokens so far, by share
    while streams:
        i = min(streams, key=lambda i: full[i])
        document = next(streams[i], None)
        if document is None:
            del streams[i]
        else:
            full[i] += len(document.ids) / (sources[i].share or 1.0)
            yield document


def _documents(number: int, source: Source, tokenizer: Tokenizer) -> Iterator[Document]:
    for sample in read_samples(source.path):
        for part, ids in enumerate(document_ids(sample, tokenizer)):
            yield Document(number, sample if part == 0 else Sample(sample.origin), ids)


def document_ids(sample: Sample, tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Ids of one document: a text with what the tokenizer adds at its start, closed by the end token.

    They come in parts of `limits.PIECE` characters: a line of 60 MB would take 10 GB as a whole.
    """
    # A chat template writes its own special tokens
    templated = bool(sample.messages) and tokenizer.has_chat_template
    try:
        text = tokenizer.chat(sample.messages) if sample.messages else sample.text
    except DscError as error:
        raise DscError(f"{sample.origin}: {error.what}", error.fix) from None
    end, before = list(tokenizer.eos_ids[:1]), None
    for ids in tokenizer.encoded(text, limits.PIECE, special=not templated):
        if before is not None:
            yield before
        before = ids
    if before is not None:
        yield before if before[-1:] == end else [*before, *end]


def interleave(streams: Iterable[Iterator[Item]]) -> Iterator[Item]:
    """One item of each stream in turn, until all are used up."""
    waiting = list(streams)
    while waiting:
        going = []
        for stream in waiting:
            for item in stream:
                yield item
                going.append(stream)
                break
        waiting = going

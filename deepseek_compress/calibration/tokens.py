"""Calibration text to token windows: documents of all sources in turn, one after the other, cut to equal length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from deepseek_compress.calibration.sources import Sample, read_samples
from deepseek_compress.errors import DscError
from deepseek_compress.models.tokenizer import Tokenizer

Item = TypeVar("Item")


def calibration_tokens(sources: Sequence[str | Path], tokenizer: Tokenizer, samples: int, length: int) -> Tensor:
    """int64 (samples, length). Reads no more than it needs; raises DscError when the text is too short.

    A document is ended by the model's end token; windows cross documents, as in pre-training.
    """
    wanted = samples * length
    ids: list[int] = []
    for sample in interleave([read_samples(source) for source in sources]):
        ids += document_ids(sample, tokenizer)
        if len(ids) >= wanted:
            return torch.tensor(ids[:wanted], dtype=torch.long).view(samples, length)
    named = ", ".join(map(str, sources))
    fix = f"give more text, or set samples: {len(ids) // length}" if len(ids) >= length else "give more text"
    raise DscError(f"{named}: {len(ids)} tokens of calibration text, {samples} x {length} asked for", fix)


def document_ids(sample: Sample, tokenizer: Tokenizer) -> list[int]:
    """Ids of one document: as a whole text with what the tokenizer adds at its ends, closed by the end token."""
    # A chat template writes its own special tokens
    templated = bool(sample.messages) and tokenizer.has_chat_template
    try:
        text = tokenizer.chat(sample.messages) if sample.messages else sample.text
    except DscError as error:
        raise DscError(f"{sample.origin}: {error.what}", error.fix) from None
    ids = tokenizer.encode(text, special=not templated)
    end = tokenizer.eos_ids[:1]
    return ids if not end or ids[-1:] == list(end) else [*ids, *end]


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

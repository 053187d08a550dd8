"""A teacher's recorded predictions on disk: shards of safetensors with their hashes, `teacher.json` last.

    teacher-00003.safetensors
      tokens      int32 (T,)        ids of the shard's documents, one after the other
      lengths     int32 (D,)        tokens of each document
      prompts     int32 (D,)        how many of them are its prompt
      ids         uint16 (P, n)     entries of each of the P = T - D positions; with larger vocabularies
      high        uint8 (P, n)      ids = high * 65536 + ids
      log_probs   float16 (P, n)    at the temperature of the recording
      certain     uint8 (P,)        how many of the entries were not drawn, see `words`

An `exact` cache has all of a small vocabulary and no ids. A shard appears under its name once it was written and read
back; `recording.json` then lists it with its hash, so that an interrupted recording resumes after the last one that is
intact. It also says what it is a recording of, and another is refused with what differs. Reading maps the files: of a
cache larger than the memory only what a batch needs is there.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from deepseek_compress import provenance
from deepseek_compress.checkpoint.files import disk_errors, kept, read_sealed, sync, write_sealed
from deepseek_compress.checkpoint.header import Location, read_shard_header
from deepseek_compress.checkpoint.shards import ShardFile
from deepseek_compress.distillation.documents import Batch, Document
from deepseek_compress.distillation.losses import Target
from deepseek_compress.distillation.teachers import Said
from deepseek_compress.distillation.words import Words
from deepseek_compress.errors import DscError, raise_problems

INDEX, RECORDING = "teacher.json", "recording.json"
SCHEMA = 2  # 1 had no checksum
_NUMPY = {torch.uint8: np.uint8, torch.uint16: np.uint16, torch.int32: np.int32, torch.float16: np.float16,
          torch.float32: np.float32}  # fmt: skip
_AGAIN = "record it again into an empty directory"


def is_cache(path: Path) -> bool:
    """Whether `path` holds a finished recording."""
    return (path / INDEX).is_file()


def bytes_a_token(count: int, vocabulary: int, form: str) -> int:
    """Of a cache with `count` entries a position, the text included."""
    if form == "exact":
        return 2 * vocabulary + 4
    return count * (4 if vocabulary <= 1 << 16 else 5) + 4 + (form == "sampled")


class CacheWriter:
    """Takes documents with the teacher's words, shard by shard."""

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        """Begin or resume the recording `identity` in `folder`. Raises DscError for a recording of another."""
        self.folder, self.identity = folder, dict(identity)
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        there = kept(folder / RECORDING)
        if there is not None:
            before = there.get("identity") or {}
            differing = sorted(k for k in {*before, *self.identity} if before.get(k) != self.identity.get(k))
            if differing:
                what = f"{folder}: a recording with other {', '.join(differing)}"
                raise DscError(what, "give the same again to resume, or another directory")
        elif not (folder / RECORDING).is_file() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise DscError(f"{folder}: exists and is not a recording of dsc", "give another directory")
        listed = (there or {}).get("shards") or []  # nothing where it is damaged: it is recorded again
        intact = itertools.takewhile(lambda facts: not list(_damage(folder, facts)), listed)
        self.shards: list[dict[str, Any]] = list(intact)
        self._list()

    @property
    def documents(self) -> int:
        """Number of documents that are safe on the disk."""
        return sum(shard["documents"] for shard in self.shards)

    def add(self, documents: Sequence[Document], words: Words, vocabulary: int, form: str) -> None:
        """Write a shard: `documents`, and the words at all of their positions (P, n)."""
        growing = self.folder / ".teacher.tmp"
        file = ShardFile(growing)
        file.add("tokens", torch.tensor([token for document in documents for token in document.ids], dtype=torch.int32))
        file.add("lengths", torch.tensor([len(document.ids) for document in documents], dtype=torch.int32))
        file.add("prompts", torch.tensor([document.prompt for document in documents], dtype=torch.int32))
        if form != "exact":
            file.add("ids", (words.ids & 0xFFFF).to(torch.int32).to(torch.uint16))
            if vocabulary > 1 << 16:
                file.add("high", (words.ids >> 16).to(torch.uint8))
        file.add("log_probs", words.log_probs.half())
        if form == "sampled":
            file.add("certain", words.certain.to(torch.uint8))
        shard = file.close()
        path = self.folder / f"teacher-{len(self.shards) + 1:05d}.safetensors"
        with disk_errors(path):
            os.replace(growing, path)
            sync(self.folder)
        counts = {"documents": len(documents), "tokens": sum(len(document.ids) for document in documents)}
        self.shards.append({"file": path.name, **counts, "bytes": shard.bytes, "blake3": shard.blake3})
        self._list()

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Write the index."""
        write_sealed(self.folder / INDEX, {"schema": SCHEMA, **self.identity, **facts, "shards": self.shards})

    def _list(self) -> None:
        """Write down which shards are safe."""
        write_sealed(self.folder / RECORDING, {"identity": self.identity, "shards": self.shards})


def read_index(folder: Path) -> dict[str, Any]:
    """`teacher.json` of a finished recording. Raises DscError where it is damaged, or not of its form."""
    path = folder / INDEX
    index = read_sealed(path, strict=False)
    try:
        _Index.model_validate(index)
    except ValidationError as error:
        places = sorted({".".join(map(str, item["loc"])) for item in error.errors(include_url=False)})
        raise DscError(f"{path}: {', '.join(places[:3])}: not what dsc writes there", _AGAIN) from None
    return index


class _Facts(BaseModel, strict=True):
    file: str = Field(pattern=r"^teacher-\d{5,9}\.safetensors$")
    bytes: int
    blake3: str


class _Index(BaseModel, strict=True):
    """Validated fields of the index file."""

    form: Literal["sampled", "top_k", "exact"]
    vocabulary: int = Field(gt=0)
    temperature: float = Field(gt=0)
    tokenizer: str
    documents: int
    tokens: int
    bytes_a_token: float
    shards: list[_Facts]


@dataclass(frozen=True)
class Shard:
    """A mapped file."""

    arrays: Mapping[str, NDArray[Any]]

    @cached_property
    def starts(self) -> NDArray[Any]:
        """First token of each document, and the end."""
        return np.concatenate(([0], np.cumsum(self.arrays["lengths"], dtype=np.int64)))

    def document(self, number: int) -> Document:
        """Return the text of one document."""
        start, end = self.starts[number], self.starts[number + 1]
        return Document(self.arrays["tokens"][start:end].tolist(), int(self.arrays["prompts"][number]))

    def rows(self, name: str, number: int) -> NDArray[Any]:
        """Return what `name` has at the positions of a document."""
        return self.arrays[name][self.starts[number] - number : self.starts[number + 1] - number - 1]


class CachedTeacher:
    """A teacher that is not there: its words from a finished recording."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        """Open and check every shard against the index. Raises DscError for what is damaged.

        `device`: where what it says is needed.
        """
        if not is_cache(folder):
            fix = "run the recording to its end" if (folder / RECORDING).is_file() else "give a directory of dsc"
            raise DscError(f"{folder}: no finished recording of a teacher", fix)
        self.folder, self.index, self.device = folder, read_index(folder), device
        self.form, self.vocabulary = str(self.index["form"]), int(self.index["vocabulary"])
        self.temperature = float(self.index["temperature"])
        raise_problems(problem for facts in self.index["shards"] for problem in _damage(folder, facts))
        self._shards = [_mapped(folder / facts["file"]) for facts in self.index["shards"]]
        self._places = [(shard, number) for shard in self._shards for number in range(len(shard.arrays["lengths"]))]

    def documents(self) -> list[Document]:
        """Return the text that was recorded."""
        return [shard.document(number) for shard, number in self._places]

    def said(self, batch: Batch, hidden: bool = False, routers: bool = False) -> Said:
        """Return the words at the positions of a batch of these documents."""
        if hidden or routers:
            raise DscError(f"{self.folder}: has no hidden states", "leave the losses hidden_states and router out")
        log_probs = self._gather("log_probs", batch.numbers).float()
        if self.form == "exact":
            return Said(lambda rows: Target(log_probs[rows].log_softmax(-1)))
        ids = self._gather("ids", batch.numbers).long()
        if self.vocabulary > 1 << 16:
            ids += self._gather("high", batch.numbers).long() << 16
        if self.form == "top_k":
            return Said(lambda rows: Target(log_probs[rows], ids[rows]))
        certain = self._gather("certain", batch.numbers).long()
        return Said(lambda rows: Target(log_probs[rows], ids[rows], certain[rows]))

    def _gather(self, name: str, numbers: Iterable[int]) -> Tensor:
        rows = np.concatenate([shard.rows(name, place) for shard, place in (self._places[n] for n in numbers)])
        wide = rows.astype(np.int32) if rows.dtype == np.uint16 else rows  # torch computes little with uint16
        return torch.from_numpy(wide).to(self.device)


def _damage(folder: Path, facts: Mapping[str, Any]) -> Iterable[DscError]:
    path = folder / facts["file"]
    if not path.is_file():
        yield DscError(f"{path}: missing", _AGAIN)
    elif path.stat().st_size != facts["bytes"]:
        yield DscError(f"{path}: {path.stat().st_size} bytes, {facts['bytes']} were written", _AGAIN)
    elif provenance.hash_file(path) != facts["blake3"]:
        yield DscError(f"{path}: not the bytes that were written", _AGAIN)


def _mapped(path: Path) -> Shard:
    places, problems = read_shard_header(path)
    if not problems and not _fits(places):
        problems = [DscError(f"{path}: not a shard of a recording")]
    raise_problems(DscError(problem.what, _AGAIN) for problem in problems)
    shard = Shard({name: _map(place) for name, place in places.items()})
    if int(shard.arrays["lengths"].min(initial=1)) < 1 or shard.starts[-1] != len(shard.arrays["tokens"]):
        raise DscError(f"{path}: its documents have other lengths than its text", _AGAIN)
    return shard


def _fits(places: Mapping[str, Location]) -> bool:
    """Whether types are known and the arrays have as many rows as there are tokens, documents and positions."""
    if not {"tokens", "lengths", "prompts", "log_probs"} <= places.keys():
        return False
    tokens, documents = (places[name].shape[:1] for name in ("tokens", "lengths"))
    rows = {"tokens": tokens, "lengths": documents, "prompts": documents}
    positions = (tokens[0] - documents[0],) if tokens and documents else ()
    known = all(place.dtype in _NUMPY for place in places.values())
    return known and all(place.shape[:1] == rows.get(name, positions) for name, place in places.items())


def _map(place: Location) -> NDArray[Any]:
    return np.memmap(place.file, dtype=_NUMPY[place.dtype], mode="r", offset=place.offset, shape=place.shape)

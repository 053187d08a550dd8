"""A checkpoint whose reads also go into the hash of a file, which then need not be read a second time for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import blake3
import torch
from torch import Tensor

from deepseek_compress.checkpoint.files import blocks, disk_errors
from deepseek_compress.checkpoint.header import Location
from deepseek_compress.checkpoint.reader import Checkpoint


class FileHash:
    """BLAKE3 of a file from the pieces of it that pass by, in the file's order; what does not pass by is read."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._hash = blake3.blake3()
        self._place = 0  # up to which byte it is hashed

    def saw(self, place: int, piece: memoryview) -> None:
        """The bytes of the file from `place` on; those that come a second time are left out."""
        if place > self._place:
            self._read(place - self._place)
        if place == self._place:
            self._hash.update(piece)
            self._place += len(piece)

    def hexdigest(self) -> str:
        """Of the whole file: what `b3sum` prints."""
        self._read(None)
        return self._hash.hexdigest()

    def _read(self, count: int | None) -> None:
        with disk_errors(self.file), open(self.file, "rb", buffering=0) as file:
            file.seek(self._place)
            for block in blocks(file.fileno(), count):
                self._hash.update(block)
                self._place += len(block)


@dataclass(frozen=True)
class Hashed(Checkpoint):
    """A checkpoint with the hash of one of its files under way; it stays in its process."""

    hash: FileHash

    def read_raw(self, name: str) -> dict[str, Tensor]:
        """The stored parts."""
        parts = super().read_raw(name)
        for suffix, place in sorted(self._info(name).parts.items(), key=lambda part: part[1].offset):
            if place.file == self.hash.file:
                self.hash.saw(place.offset, parts[suffix].reshape(-1).view(torch.uint8).numpy().data)
        return parts

    def pieces(self, place: Location) -> Iterator[memoryview]:
        """A stored tensor's bytes."""
        done = 0
        for piece in super().pieces(place):
            if place.file == self.hash.file:
                self.hash.saw(place.offset + done, piece)
            done += len(piece)
            yield piece

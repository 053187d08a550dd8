"""A checkpoint whose reads also go into the hash of a file, which then need not be read a second time for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from deepseek_compress.checkpoint.files import FileHash
from deepseek_compress.checkpoint.header import Location
from deepseek_compress.checkpoint.reader import Checkpoint


@dataclass(frozen=True)
class Hashed(Checkpoint):
    """A checkpoint with the hash of one of its files under way; it stays in its process."""

    hash: FileHash

    def read_raw(self, name: str) -> dict[str, Tensor]:
        """Return the stored parts."""
        parts = super().read_raw(name)
        for suffix, place in sorted(self._info(name).parts.items(), key=lambda part: part[1].offset):
            if place.file == self.hash.file:
                self.hash.saw(place.offset, parts[suffix].reshape(-1).view(torch.uint8).numpy().data)
        return parts

    def read_slice(self, name: str, suffix: str, start: int, count: int) -> Tensor:
        """Rows of a stored part; those of scales, which lie after all codes, are hashed when the file is done."""
        rows = super().read_slice(name, suffix, start, count)
        place = self._info(name).parts[suffix]
        if suffix == "weight" and place.file == self.hash.file:
            at = place.offset + start * (place.bytes // place.shape[0])
            self.hash.saw(at, rows.reshape(-1).view(torch.uint8).numpy().data)
        return rows

    def pieces(self, place: Location) -> Iterator[memoryview]:
        """Yield a stored tensor's bytes."""
        done = 0
        for piece in super().pieces(place):
            if place.file == self.hash.file:
                self.hash.saw(place.offset + done, piece)
            done += len(piece)
            yield piece

"""One safetensors file, written as its tensors come, then read back from the disk and compared.

    ShardFile(path).add(name, tensor) ... .close() -> Shard(bytes, blake3, names)

A safetensors header stands before the data and is known last. So the first 64 MiB wait in memory: a smaller shard gets
room for its header, a larger one gets 1 MiB. The header is filled up with spaces, which the format allows, so that the
data begin where the disk likes (see `direct`). With an `Outline` the header is known first, and nothing waits.

Tensors lie without holes, as the format asks, yet each at a multiple of its element size, as readers that map the file
need: those whose size is a multiple of 8 bytes go first, as they come; the few others last, widest type first.

Without an outline, `close` syncs the file and reads it again from the disk: the data must have the BLAKE3 that it had
in memory. The same pass takes the BLAKE3 of the whole file, which is what `b3sum` prints. With one, that is taken as
the bytes come, once, and each block is read again and compared as soon as it is written.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import Executor
from pathlib import Path
from typing import NamedTuple

import blake3
import torch
from torch import Tensor

from deepseek_compress.checkpoint.direct import ALIGNMENT, DirectFile, other_bytes, read_back
from deepseek_compress.checkpoint.files import disk_errors, remove
from deepseek_compress.checkpoint.header import DTYPE_NAMES, Location

ELEMENT = 8  # bytes of the widest one
_IN_MEMORY = 64 << 20  # bytes of data before the file is begun
_HEADER_ROOM = 1 << 20  # bytes of header in a file that was begun early; about 6,000 tensors


Outline = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # stored name -> type and shape, in the order of `add`
_Entries = dict[str, tuple[str, tuple[int, ...], int]]  # stored name -> dtype, shape, bytes, in the order of the file


class Shard(NamedTuple):
    """A finished file."""

    bytes: int
    blake3: str  # of the whole file, hexadecimal
    names: tuple[str, ...]


class ShardFile:
    """An unfinished file. `thread` writes while tensors still come; `outline`: all that will come, if it is known."""

    def __init__(self, path: Path, thread: Executor | None = None, outline: Outline | None = None) -> None:
        self.path = path
        self.bytes = 0  # of data, so far
        self._thread = thread
        self._entries: _Entries = {}
        self._waiting: list[Tensor] = []  # data that is not in the file yet, flat uint8
        self._waiting_bytes = 0
        self._odd: dict[str, Tensor] = {}  # sizes that would misalign what follows
        self._hash = blake3.blake3()  # of the data; with an outline, of the whole file
        self._file: DirectFile | None = None
        self._room = 0  # bytes between the header's size and the data
        self._planned = None if outline is None else _entries(outline)
        self._announced = b"" if self._planned is None else self._head(self._planned)
        self._hash.update(self._announced)

    @property
    def full(self) -> bool:
        """Whether the header of a file begun early has no room for many more tensors."""
        return (
            self._planned is None
            and self._file is not None
            and 256 * (len(self._entries) + len(self._odd)) > self._room
        )

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; it is copied or written before this returns, unless fewer than 64 MiB wait."""
        if name in self._entries or name in self._odd:
            raise ValueError(f"{name} is written twice")
        self.bytes += tensor.nbytes
        if tensor.nbytes % ELEMENT:
            self._odd[name] = tensor.clone()
        else:
            self._append(name, tensor)

    def stream(self, name: str, place: Location, pieces: Iterable[memoryview]) -> None:
        """Append a tensor of type, shape and size of `place`, a multiple of 8 bytes, that comes piece by piece."""
        self._entries[name] = (DTYPE_NAMES[place.dtype], place.shape, place.bytes)
        self.bytes += place.bytes
        file = self._begun()
        for piece in pieces:
            self._write(file, piece)

    def close(self) -> Shard:
        """Write what waits and the header, sync, read back, compare. The file has its final content afterwards.

        May run in `thread` itself, where all that was left to it is done before this begins.
        """
        self._thread = None
        if self._file is not None:
            with disk_errors(self.path):
                self._file.wait()
        for name, tensor in sorted(self._odd.items(), key=lambda item: -item[1].dtype.itemsize):
            self._append(name, tensor)
        if self._planned is not None and list(self._entries.items()) != list(self._planned.items()):
            raise ValueError(f"{self.path}: what came is not what was announced")
        head = self._announced or self._head(self._entries)
        with disk_errors(self.path):
            self._begun().finish(head)
        whole = self._hash.hexdigest() if self._announced else self._verify(head)
        return Shard(len(head) + self.bytes, whole, tuple(self._entries))

    def discard(self) -> None:
        """Close and remove the unfinished file."""
        if self._file is not None:
            self._file.close()
        remove(self.path)

    def _append(self, name: str, tensor: Tensor) -> None:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._entries[name] = (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
        if self._file is None and self._waiting_bytes + raw.numel() <= _IN_MEMORY:
            same = raw.data_ptr() == tensor.data_ptr()  # the caller may reuse its memory
            self._waiting.append(raw.clone() if same else raw)
            self._waiting_bytes += raw.numel()
            return
        self._write(self._begun(), raw.numpy().data)

    def _begun(self, header: int = _HEADER_ROOM) -> DirectFile:
        """Return the file, begun with room for so many bytes of header where it is not yet."""
        if self._file is None:
            start = -(-(8 + header) // ALIGNMENT) * ALIGNMENT
            self._room = start - 8
            with disk_errors(self.path):
                self._file = DirectFile(self.path, start, self._thread, checked=self._planned is not None)
            for raw in self._waiting:
                self._write(self._file, raw.numpy().data)
            self._waiting.clear()
        return self._file

    def _write(self, file: DirectFile, view: memoryview) -> None:
        self._hash.update(view)
        with disk_errors(self.path):
            file.write(view)

    def _head(self, entries: _Entries) -> bytes:
        """All bytes before the data of a file that is begun for them, where it was not yet."""
        header = _header(entries)
        self._begun(len(header))
        if len(header) > self._room:
            raise ValueError(f"{self.path}: a header of {len(header)} bytes does not fit {self._room}")
        return struct.pack("<Q", self._room) + header.ljust(self._room)

    def _verify(self, head: bytes) -> str:
        """BLAKE3 of the file as it lies on the disk; `DscError` where it is not what was written."""
        data, whole = blake3.blake3(), blake3.blake3()
        missing = len(head)
        same = True
        with disk_errors(self.path):
            for block in read_back(self.path):
                whole.update(block)
                first, rest = block[:missing], block[missing:]
                same = same and first == head[len(head) - missing :][: len(first)]
                data.update(rest)
                missing -= len(first)
        if not same or data.digest() != self._hash.digest():
            raise other_bytes(self.path)
        return whole.hexdigest()


def _header(entries: _Entries) -> bytes:
    """JSON."""
    position = 0
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for name, (dtype, shape, size) in entries.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    return json.dumps(header, separators=(",", ":")).encode("utf-8")


def _entries(outline: Outline) -> _Entries:
    """In the order of the file: those that would misalign what follows last, widest type first."""
    sizes = {name: (kind, shape, kind.itemsize * math.prod(shape)) for name, (kind, shape) in outline.items()}
    late = sorted((n for n, e in sizes.items() if e[2] % ELEMENT), key=lambda name: -sizes[name][0].itemsize)
    ordered = [*(name for name, entry in sizes.items() if not entry[2] % ELEMENT), *late]
    return {name: (DTYPE_NAMES[sizes[name][0]], *sizes[name][1:]) for name in ordered}

"""One safetensors file, written as its tensors come, then read back from the disk and compared.

    ShardFile(path).add(name, tensor) ... .close() -> Shard(bytes, blake3, names)

A safetensors header stands before the data and is known last. So the first 64 MiB wait in memory: a smaller shard gets
a header of just its size, a larger one gets room for 1 MiB of header, filled up with spaces, which the format allows.

Tensors lie without holes, as the format asks, yet each at a multiple of its element size, as readers that map the file
need: those whose size is a multiple of 8 bytes go first, as they come; the few others last, widest type first.

`close` syncs the file and reads it again: the data must have the BLAKE3 that it had in memory. The same pass takes the
BLAKE3 of the whole file, which is what `b3sum` prints. The page cache may answer: an error of the disk itself is what
the sync reports, and `dsc inspect` compares the hashes whenever one likes.
"""

from __future__ import annotations

import json
import os
import struct
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import NamedTuple

import blake3
import torch
from torch import Tensor

from deepseek_compress.checkpoint.files import blocks, disk_errors
from deepseek_compress.checkpoint.header import DTYPE_NAMES, Location
from deepseek_compress.checkpoint.reader import read_tensor
from deepseek_compress.errors import DscError

_ALIGNMENT = 8
_IN_MEMORY = 64 << 20  # bytes of data before the file is begun
_WRITE = 256 << 10  # bytes at a time: larger ones make the kernel hunt for large pages, three times as slow
_SYNC = 128 << 20  # bytes written between two early starts of the disk
_STREAMED = 32 << 20  # bytes from which a tensor is copied without ever being whole in memory
_HEADER_ROOM = 1 << 20  # bytes of header in a file that was begun early; about 6,000 tensors


class Shard(NamedTuple):
    """A finished file."""

    bytes: int
    blake3: str  # of the whole file, hexadecimal
    names: tuple[str, ...]


class ShardFile:
    """An unfinished file. `thread` starts the disk while tensors still come; without it, `close` does it all."""

    def __init__(self, path: Path, thread: Executor | None = None) -> None:
        self.path = path
        self.bytes = 0  # of data, so far
        self._thread = thread
        self._unsynced = 0  # bytes
        self._syncing: Future[None] | None = None
        self._entries: dict[str, tuple[str, tuple[int, ...], int]] = {}  # name -> dtype, shape, bytes
        self._waiting: list[Tensor] = []  # data that is not in the file yet, flat uint8
        self._waiting_bytes = 0
        self._odd: dict[str, Tensor] = {}  # sizes that would misalign what follows
        self._hash = blake3.blake3()
        self._fd = -1
        self._room = 0

    @property
    def full(self) -> bool:
        """Whether the header of a file begun early has no room for many more tensors."""
        return self._fd >= 0 and 256 * (len(self._entries) + len(self._odd)) > self._room

    def add(self, name: str, tensor: Tensor) -> None:
        """Append one tensor; it is copied or written before this returns, unless fewer than 64 MiB wait."""
        if name in self._entries or name in self._odd:
            raise ValueError(f"{name} is written twice")
        self.bytes += tensor.nbytes
        if tensor.nbytes % _ALIGNMENT:
            self._odd[name] = tensor.clone()
        else:
            self._append(name, tensor)

    def copy(self, name: str, place: Location) -> None:
        """Append a stored tensor of another file, unchanged; a large one goes through a small buffer."""
        if place.bytes < _STREAMED or place.bytes % _ALIGNMENT:
            self.add(name, read_tensor(place, name))
            return
        self._entries[name] = (DTYPE_NAMES[place.dtype], place.shape, place.bytes)
        self.bytes += place.bytes
        if self._fd < 0:
            self._begin(_HEADER_ROOM)
        done = 0
        with disk_errors(place.file), open(place.file, "rb", buffering=0) as file:
            file.seek(place.offset)
            for block in blocks(file.fileno(), place.bytes):
                self._write(block)
                done += len(block)
        if done != place.bytes:
            raise DscError(f"{name}: {place.file} ends early", "the file changed while it was read; start again")

    def close(self) -> Shard:
        """Write what waits and the header, sync, read back, compare. The file has its final content afterwards.

        May run in `thread` itself, where an earlier sync is done before this begins.
        """
        with disk_errors(self.path):
            if self._syncing is not None:
                self._syncing.result()
        self._thread = None
        for name, tensor in sorted(self._odd.items(), key=lambda item: -item[1].dtype.itemsize):
            self._append(name, tensor)
        header = self._header()
        if self._fd < 0:
            self._begin(len(header))
        elif len(header) > self._room:
            raise ValueError(f"{self.path}: a header of {len(header)} bytes does not fit {self._room}")
        with disk_errors(self.path):
            os.pwrite(self._fd, struct.pack("<Q", self._room) + header.ljust(self._room), 0)
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        return Shard(8 + self._room + self.bytes, self._verify(), tuple(self._entries))

    def discard(self) -> None:
        """Close and remove the unfinished file, once nothing syncs it any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        self.path.unlink(missing_ok=True)

    def _append(self, name: str, tensor: Tensor) -> None:
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._entries[name] = (DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
        if self._fd < 0 and self._waiting_bytes + raw.numel() <= _IN_MEMORY:
            same = raw.data_ptr() == tensor.data_ptr()  # the caller may reuse its memory
            self._waiting.append(raw.clone() if same else raw)
            self._waiting_bytes += raw.numel()
            return
        if self._fd < 0:
            self._begin(_HEADER_ROOM)
        self._write(raw.numpy().data)

    def _begin(self, room: int) -> None:
        self._room = room
        with disk_errors(self.path):
            self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.lseek(self._fd, 8 + room, os.SEEK_SET)
        for raw in self._waiting:
            self._write(raw.numpy().data)
        self._waiting.clear()

    def _write(self, view: memoryview) -> None:
        self._unsynced += len(view)
        self._hash.update(view)
        with disk_errors(self.path):
            while view:
                view = view[os.write(self._fd, view[:_WRITE]) :]
        if self._thread is not None and self._unsynced >= _SYNC and (self._syncing is None or self._syncing.done()):
            self._syncing, self._unsynced = self._thread.submit(os.fdatasync, self._fd), 0

    def _header(self) -> bytes:
        """JSON, padded with spaces so that the data begins at a multiple of 8."""
        position = 0
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        for name, (dtype, shape, size) in self._entries.items():
            entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
            position += size
        text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
        return text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)

    def _verify(self) -> str:
        """BLAKE3 of the file as it lies on the disk; `DscError` where the data are not what was written."""
        data, whole = blake3.blake3(), blake3.blake3()
        start = 8 + self._room
        with disk_errors(self.path), open(self.path, "rb", buffering=0) as file:
            head = file.read(start)
            whole.update(head)
            for block in blocks(file.fileno()):
                data.update(block)
                whole.update(block)
        if data.digest() != self._hash.digest():
            raise DscError(f"{self.path}: reads back other bytes than were written", "check the disk, then start again")
        return whole.hexdigest()

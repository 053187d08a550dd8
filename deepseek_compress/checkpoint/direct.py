"""A file written front to back and read back, past the page cache where the file system allows it (O_DIRECT).

What is written once and read back once gains nothing from that cache: filling fresh pages takes more processor time
than packing the weights, and pushes out the source that is still to be read. And a read that memory answers says
nothing about the disk. Where O_DIRECT is refused, the same calls go through the cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from pathlib import Path

import numpy as np

from deepseek_compress.errors import DscError

ALIGNMENT = 4096  # bytes: of places, sizes and memory, what every disk takes
_DIRECT: int = getattr(os, "O_DIRECT", 0)  # Linux has it
_BLOCK = 4 << 20  # bytes handed to the disk at a time


class DirectFile:
    """The data of a new file from byte `start` on, a multiple of `ALIGNMENT`; `finish` writes what stands before it.

    `thread` writes one block while the next is filled; without it, `write` waits. `checked`: each block is read again
    and compared while it is still there. Errors of the disk come as OSError, and what came back wrong as `DscError`,
    from the call that follows at the latest.
    """

    def __init__(self, path: Path, start: int, thread: Executor | None, checked: bool = False) -> None:
        assert start % ALIGNMENT == 0
        self._path = path
        self._fd = _open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        self._thread = thread
        self._again = mmap.mmap(-1, _BLOCK) if checked else None  # what was read back
        self._blocks = [mmap.mmap(-1, _BLOCK) for _ in range(1 if thread is None else 2)]  # aligned memory
        self._filled = 0  # bytes of the first block
        self._place = start  # of the first block, in the file
        self._writing: Future[None] | None = None

    def write(self, view: memoryview) -> None:
        """Append bytes."""
        while view:
            part = view[: _BLOCK - self._filled]
            self._blocks[0][self._filled : self._filled + len(part)] = part
            self._filled += len(part)
            view = view[len(part) :]
            if self._filled == _BLOCK:
                self._hand_over()

    def finish(self, head: bytes) -> None:
        """Write the rest and `head`, `start` bytes, sync, close. Waits for `thread`, so it must not run there."""
        size = self._place + self._filled
        self.wait()
        self._put(self._blocks[0], _aligned(self._filled), self._place)
        first = mmap.mmap(-1, _aligned(len(head)))
        first[: len(head)] = head
        self._put(first, len(first), 0)
        os.ftruncate(self._fd, size)
        os.fsync(self._fd)
        self.close()

    def wait(self) -> None:
        """Until nothing is being written. From here on, `write` does without the thread."""
        self._thread = None
        if self._writing is not None:
            self._writing.result()
            self._writing = None

    def close(self) -> None:
        """Close the file as it is, once nothing writes it any more."""
        if self._writing is not None:
            self._writing.exception()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _hand_over(self) -> None:
        """Write the full block, or leave that to the thread and fill the other block, once that is written."""
        if self._writing is not None:
            self._writing.result()
        if self._thread is None:
            self._put(self._blocks[0], _BLOCK, self._place)
        else:
            self._writing = self._thread.submit(self._put, self._blocks[0], _BLOCK, self._place)
            self._blocks.reverse()
        self._place += _BLOCK
        self._filled = 0

    def _put(self, block: mmap.mmap, size: int, place: int) -> None:
        """Write the first `size` bytes of a block, and see that they are there."""
        view, done = memoryview(block), 0
        while done < size:
            done += _retried(os.pwrite, self._fd, view[done:size], place + done)
        if self._again is None:
            return
        for start in range(0, size, _BLOCK):
            self._compare(view[start : min(start + _BLOCK, size)], place + start)

    def _compare(self, view: memoryview, place: int) -> None:
        assert self._again is not None
        found, done = memoryview(self._again)[: len(view)], 0
        while done < len(view):
            got = _retried(os.preadv, self._fd, [found[done:]], place + done)
            if not got:
                break
            done += got
        here, there = (np.frombuffer(part, dtype=np.uint64) for part in (view, found))
        if done < len(view) or not np.array_equal(here, there):
            raise other_bytes(self._path)


def other_bytes(path: Path) -> DscError:
    """Return what to say where a disk does not give back what it got."""
    return DscError(f"{path}: reads back other bytes than were written", "check the disk, then start again")


def read_back(path: Path) -> Iterator[memoryview]:
    """Yield the file's bytes; each piece is valid until the next is asked for."""
    fd = _open(path, os.O_RDONLY)
    try:
        block = mmap.mmap(-1, _BLOCK)
        view = memoryview(block)
        while got := _retried(os.readv, fd, [block]):
            yield view[:got]
    finally:
        os.close(fd)


def _open(path: Path, flags: int) -> int:
    try:
        return os.open(path, flags | _DIRECT, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o644)


def _retried(call: Callable[..., int], fd: int, *arguments: object) -> int:
    """Return the call again without O_DIRECT where the file system takes the flag, but not our alignment or a
    rest's."""
    try:
        return call(fd, *arguments)
    except OSError as error:
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        if error.errno != errno.EINVAL or not flags & _DIRECT:
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags & ~_DIRECT)
        return call(fd, *arguments)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT

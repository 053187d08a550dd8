"""Stored tensors read ahead of who will ask for them, and copied to a GPU while it computes.

A thread reads them in the order in which they will be asked for, into page-locked memory. Whoever takes one starts the
copies of those that are there by then, on a stream of their own, so that the GPU copies while it computes; the stream
that takes a tensor waits for its copy alone. At most `limit` bytes are read and not taken. They are kept as stored: to
decode one takes the time of reading it from the GPU's memory once, and decoded it would be up to four times as large.

What is asked for out of order is found as long as it is at most `SLACK` tensors late; what was not read yet is left
to who asks. On the CPU nothing is read ahead: there is nothing to copy, and the disk reads ahead by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from threading import Condition, Thread
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from deepseek_compress.checkpoint.header import Location
from deepseek_compress.checkpoint.reader import Checkpoint, read_tensor
from deepseek_compress.errors import DscError

if TYPE_CHECKING:
    from collections.abc import Iterator

LIMIT = 1 << 30  # bytes
SLACK = 64  # tensors

Parts = dict[str, Tensor]


class _Read(NamedTuple):
    parts: Parts
    there: bool = False  # on the device, not on the host
    copied: Any = None  # event of the copy's stream


class Ahead:
    """Reads `names` of `source` ahead, for `device`. A context: it ends the thread, and forgets what nobody took."""

    def __init__(self, source: Checkpoint, names: Sequence[str], device: torch.device, limit: int = LIMIT) -> None:
        self._source, self._device, self._limit = source, device, limit
        self._names = [name for name in names if name in source.header.tensors]
        self._place = {name: place for place, name in enumerate(self._names)}
        self._stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._changed = Condition()
        self._read: dict[str, _Read] = {}
        self._bytes = 0  # read, or being read, and not taken
        self._next = 0  # of `names`, to be read
        self._reading = ""
        self._gone: set[str] = set()  # asked for, before they were read
        self._stopped = False
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self, name: str) -> Parts | None:
        """Return the stored parts of `name` on the device; None where they were not read yet, or are not read ahead."""
        place = self._place.get(name)
        if place is None:
            return None
        with self._changed:
            while self._reading == name:
                self._changed.wait()
            self._copy()
            self._forget(place - SLACK)
            found = self._read.pop(name, None)
            if found is None:
                self._gone.add(name)
                return None
            self._free(name)
        return self._waited(found)

    def finish(self) -> None:
        """Wait until all that has room is read."""
        with self._changed:
            while self._next < len(self._names) and not self._full():
                self._changed.wait()
            while self._reading:
                self._changed.wait()

    def _run(self) -> None:
        """Of the thread: read one after the other while there is room."""
        while (name := self._following()) is not None:
            parts: Parts | None = None
            with contextlib.suppress(DscError, RuntimeError, MemoryError):  # who asks reads it, and says what is wrong
                parts = {suffix: self._host(place, name) for suffix, place in self._parts(name)}
            with self._changed:
                self._reading = ""
                if parts is None:
                    self._free(name)
                else:
                    self._read[name] = _Read(parts)
                self._changed.notify_all()

    def _following(self) -> str | None:
        with self._changed:
            while not self._stopped and self._next < len(self._names):
                name = self._names[self._next]
                if name in self._gone:
                    self._next += 1
                elif self._full():
                    self._changed.notify_all()
                    self._changed.wait()
                else:
                    self._next += 1
                    self._reading, self._bytes = name, self._bytes + self._size(name)
                    return name
            self._changed.notify_all()
            return None

    def _full(self) -> bool:
        """Whether the next one has no room; one alone always has."""
        return self._bytes > 0 and self._bytes + self._size(self._names[self._next]) > self._limit

    def _parts(self, name: str) -> Iterator[tuple[str, Location]]:
        yield from self._source.header.tensors[name].parts.items()

    def _size(self, name: str) -> int:
        return sum(place.bytes for _, place in self._parts(name))

    def _host(self, place: Location, name: str) -> Tensor:
        return read_tensor(place, name, pinned=self._stream is not None)

    def _copy(self) -> None:
        """Start the copies of what was read."""
        for name, read in self._read.items():
            if not read.there:
                with torch.cuda.stream(self._stream) if self._stream else contextlib.nullcontext():
                    parts = {suffix: part.to(self._device, non_blocking=True) for suffix, part in read.parts.items()}
                self._read[name] = _Read(parts, True, self._stream.record_event() if self._stream else None)

    def _waited(self, read: _Read) -> Parts:
        if read.copied is not None:
            here = torch.cuda.current_stream(self._device)
            here.wait_event(read.copied)
            for part in read.parts.values():
                part.record_stream(here)
        return read.parts

    def _forget(self, place: int) -> None:
        """Drop what was not asked for when it should have been, before `place`."""
        for name in [name for name in self._read if self._place[name] < place]:
            del self._read[name]
            self._free(name)

    def _free(self, name: str) -> None:
        self._bytes -= self._size(name)
        self._changed.notify_all()

    def __enter__(self) -> Ahead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()
        self._read.clear()

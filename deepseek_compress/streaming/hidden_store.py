"""Rows of float32: the activations between blocks, which may not fit into memory and then lie on disk.

Where a GPU computes they stay in its memory, up to a share of it, so that a block copies none of them; beyond that they
lie in page-locked memory or on disk.

There they are read and written with `pread` / `pwrite` into fresh buffers, never mapped: the pages of a mapped file
count as resident. A file that is kept ends with the BLAKE3 of its rows; an interrupted run takes up none that differs.
"""

from __future__ import annotations

import math
import os
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import blake3
import torch
from torch import Tensor

from deepseek_compress.checkpoint.files import blocks, remove, sync
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.planning.costs import STATES
from deepseek_compress.planning.device import memory_limit

RESIDENT = 128 << 20  # bytes
SEAL = 32  # bytes of a hash
_AGAIN = "remove the output and start again"


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DscError(f"{path}: {error.strerror}", "make room; run the same command again to resume") from None


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


class HiddenStore:
    """`rows` rows of shape `row_shape`, float32, zeros at first; `existing` takes up a file that was renamed.

    Up to `resident` bytes (None: RESIDENT, and what fits into the memory of `device`) stay in memory until `rename`;
    what is larger, and what other processes read (`resident` 0), lies in the file from the start. Without a `path`
    everything stays in memory.
    """

    def __init__(
        self,
        path: Path | None,
        rows: int,
        row_shape: tuple[int, ...],
        existing: bool = False,
        resident: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.rows, self.row_shape = rows, row_shape
        self._width = 4 * math.prod(row_shape)  # bytes of a row
        self._resident: Tensor | None = None
        self._fd = -1
        self._freed: Callable[[], object] = lambda: None
        if path is None:
            self._resident = self._zeros(torch.device(device))
            return
        self.path = path
        with _disk(path):
            self._fd = os.open(path, os.O_RDWR | (0 if existing else os.O_CREAT | os.O_TRUNC), 0o644)
            size = rows * self._width
            found = os.fstat(self._fd).st_size if existing else size
            if found not in (size, size + SEAL):  # workers open one that is not sealed yet
                self.close()
                raise DscError(f"{path}: {found} bytes, {size} expected", _AGAIN)
            if size <= (RESIDENT if resident is None else resident) or (
                resident is None and room(torch.device(device)) >= size
            ):
                self._resident = self._zeros(torch.device(device))
                if existing:
                    here = self._resident if self._resident.is_cpu else torch.empty((rows, *row_shape))
                    self._pread(_bytes(here), 0)
                    self._resident.copy_(here)
            elif not existing:
                os.ftruncate(self._fd, size)

    def _zeros(self, device: torch.device) -> Tensor:
        """Memory for all rows: of `device` where it has room, else of the host, where that GPU reads it by itself."""
        size = self.rows * self._width
        if room(device) >= size:
            _taken[device] += size
            self._freed = weakref.finalize(self, _give_back, device, size)
            return torch.zeros((self.rows, *self.row_shape), device=device)
        return torch.zeros((self.rows, *self.row_shape), pin_memory=device.type == "cuda")

    def read(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count): float32 (count, *row_shape), not to be modified."""
        if self._resident is not None:
            return self._resident[start : start + count]
        out = torch.empty((count, *self.row_shape), dtype=torch.float32)
        self._pread(_bytes(out), start)
        return out

    def write(self, start: int, rows: Tensor) -> None:
        """Replace the rows from `start` on by `rows` (n, *row_shape)."""
        if self._resident is not None:
            self._resident[start : start + len(rows)] = rows.to(self._resident.device)
        else:
            self._pwrite(_bytes(rows.detach().float().cpu().contiguous()), start)

    def gather(self, places: Sequence[int] | Tensor) -> Tensor:
        """Return the rows at `places`, float32 (n, *row_shape), in the memory where the store lies."""
        if self._resident is not None:
            return self._resident[self._placed(places)]
        places = places.tolist() if isinstance(places, Tensor) else places
        out = torch.empty((len(places), *self.row_shape), dtype=torch.float32)
        view = _bytes(out)
        for i, place in enumerate(places):
            self._pread(view[i * self._width : (i + 1) * self._width], place)
        return out

    def add(self, places: Sequence[int] | Tensor, rows: Tensor) -> None:
        """Add `rows` (n, *row_shape) to those at `places`, which differ from each other."""
        before = self.gather(places)
        total = before + rows.to(before.device)
        if self._resident is not None:
            self._resident[self._placed(places)] = total
            return
        places = places.tolist() if isinstance(places, Tensor) else places
        view = _bytes(total)
        for i, place in enumerate(places):
            self._pwrite(view[i * self._width : (i + 1) * self._width], place)

    def _placed(self, places: Sequence[int] | Tensor) -> Tensor:
        assert self._resident is not None
        return torch.as_tensor(places, dtype=torch.int64).to(self._resident.device)

    def rename(self, path: Path) -> None:
        """Make everything written durable, with its hash, then give the file its final name."""
        here = None if self._resident is None else self._resident.cpu()
        if here is not None:
            self._pwrite(_bytes(here), 0)
        with _disk(path):
            os.pwrite(self._fd, self._hash(here), self.rows * self._width)
            os.fsync(self._fd)
            os.replace(self.path, path)
            sync(path.parent)
        self.path = path

    def intact(self) -> bool:
        """Whether a file that was renamed is what it was then."""
        return os.pread(self._fd, SEAL, self.rows * self._width) == self._hash(
            None if self._resident is None else self._resident.cpu()
        )

    def _hash(self, here: Tensor | None) -> bytes:
        """BLAKE3 of the rows, which may be `here` in memory."""
        if here is not None:
            return blake3.blake3(_bytes(here)).digest()
        found = blake3.blake3()
        os.lseek(self._fd, 0, os.SEEK_SET)
        for block in blocks(self._fd, self.rows * self._width):
            found.update(block)
        return found.digest()

    def remove(self) -> None:
        """Close and delete."""
        self.close()
        remove(self.path)

    def close(self) -> None:
        """Close; the file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._resident is not None and not self._resident.is_cpu:
            self._resident = None
            self._freed()

    def __enter__(self) -> HiddenStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pread(self, view: memoryview, row: int) -> None:
        done = 0
        while done < len(view):
            got = os.preadv(self._fd, [view[done:]], row * self._width + done)
            if got == 0:
                raise DscError(f"{self.path}: ends early", _AGAIN)
            done += got

    def _pwrite(self, view: memoryview, row: int) -> None:
        done = 0
        with _disk(self.path):
            while done < len(view):
                done += os.pwritev(self._fd, [view[done:]], row * self._width + done)


def room(device: torch.device) -> int:
    """Bytes that stores may still take of a device: a share of its memory; all that is needed, of the host's."""
    if device.type == "cpu":
        return -1
    return int(STATES * memory_limit(device)) - _taken[device]


_taken: Counter[torch.device] = Counter()  # bytes of each device that stores hold


def _give_back(device: torch.device, size: int) -> None:
    _taken[device] -= size


def scratch(architecture: Architecture, tokens: int) -> int:
    """Bytes on disk while a text of `tokens` goes through a model: two hidden states, and the widest input of a linear.

    A paired run has both twice.
    """
    widest = max((linear.columns for block in architecture.blocks for linear in block.linears), default=0)
    return 2 * 4 * tokens * (2 * math.prod(architecture.row_shape) + widest)

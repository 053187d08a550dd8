"""Rows of float32 on disk: the activations between blocks, which may not fit into memory.

Read and written with `pread` / `pwrite` into fresh buffers, never mapped: pages of a mapped file count as resident.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.errors import DscError


def _bytes(tensor: Tensor) -> memoryview:
    array: Any = tensor.numpy()
    return memoryview(array).cast("B")


class Spool:
    """A file of `rows` rows of shape `row_shape`, float32. It is fresh (zeros) unless `existing`."""

    def __init__(self, path: Path, rows: int, row_shape: tuple[int, ...], existing: bool = False) -> None:
        self.path, self.rows, self.row_shape = path, rows, row_shape
        self._width = 4 * math.prod(row_shape)  # bytes of a row
        try:
            self._fd = os.open(path, os.O_RDWR | (0 if existing else os.O_CREAT | os.O_TRUNC), 0o644)
            if not existing:
                os.ftruncate(self._fd, rows * self._width)
            size = os.fstat(self._fd).st_size
        except OSError as error:
            raise DscError(f"{path}: {error.strerror}", "make room or choose another output directory") from None
        if size != rows * self._width:
            raise DscError(f"{path}: {size} bytes, {rows * self._width} expected", "remove the output and start again")

    def read(self, start: int, count: int) -> Tensor:
        """Rows [start, start + count): float32 (count, *row_shape)."""
        out = torch.empty((count, *self.row_shape), dtype=torch.float32)
        self._pread(_bytes(out), start)
        return out

    def write(self, start: int, rows: Tensor) -> None:
        """Replace the rows from `start` on by `rows` (n, *row_shape)."""
        self._pwrite(_bytes(rows.detach().float().contiguous()), start)

    def gather(self, places: list[int]) -> Tensor:
        """The rows at `places`, float32 (n, *row_shape)."""
        out = torch.empty((len(places), *self.row_shape), dtype=torch.float32)
        view = _bytes(out)
        for i, place in enumerate(places):
            self._pread(view[i * self._width : (i + 1) * self._width], place)
        return out

    def add(self, places: list[int], rows: Tensor) -> None:
        """Add `rows` (n, *row_shape) to those at `places`, which differ from each other."""
        view = _bytes(self.gather(places) + rows)
        for i, place in enumerate(places):
            self._pwrite(view[i * self._width : (i + 1) * self._width], place)

    def rename(self, path: Path) -> None:
        """Make everything written durable, then give the file its final name."""
        try:
            os.fsync(self._fd)
            os.replace(self.path, path)
        except OSError as error:
            raise DscError(f"{path}: {error.strerror}", "make room; the same command goes on") from None
        self.path = path

    def remove(self) -> None:
        """Close and delete."""
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close; the file stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Spool:
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
                raise DscError(f"{self.path}: ends early", "remove the output and start again")
            done += got

    def _pwrite(self, view: memoryview, row: int) -> None:
        done = 0
        try:
            while done < len(view):
                done += os.pwritev(self._fd, [view[done:]], row * self._width + done)
        except OSError as error:
            raise DscError(f"{self.path}: {error.strerror}", "make room; the same command goes on") from None

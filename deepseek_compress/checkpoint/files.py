"""Files of a checkpoint directory: hashed, read as JSON, written beside and renamed, errors of the disk in one line."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import blake3
import numpy as np
from torch import Tensor

from deepseek_compress.errors import DscError

_READ = 512 << 10  # bytes at a time: they stay in the cache between reading and hashing


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `DscError` where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DscError(f"{path}: {error.strerror}", "give a complete checkpoint directory") from None
    except (ValueError, RecursionError) as error:
        raise DscError(f"{path}: not valid JSON ({error})", "download the file again") from None
    if not isinstance(value, dict):
        raise DscError(f"{path}: not a JSON object", "download the file again")
    return value


def hash_file(path: Path) -> str:
    """BLAKE3 of a file, hexadecimal, in one pass: what `b3sum` prints."""
    return FileHash(path).hexdigest()


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


def blocks(fd: int, count: int | None = None) -> Iterator[memoryview]:
    """The rest of an open file, or its next `count` bytes, through one reused buffer.

    A block is valid until the next is asked for. A file that ends early ends the blocks.
    """
    buffer = memoryview(bytearray(_READ if count is None else min(_READ, count)))
    while got := os.readv(fd, [buffer if count is None else buffer[:count]]):
        yield buffer[:got]
        if count is not None:
            count -= got


def write_file(path: Path, content: bytes) -> None:
    """As `replacing` does."""
    with replacing(path) as file:
        file.write(content)


def write_arrays(path: Path, values: Mapping[str, Tensor]) -> None:
    """Tensors by name as an .npz file, as `replacing` does."""
    with replacing(path) as file:
        np.savez(file, **{name: tensor.numpy() for name, tensor in values.items()})  # type: ignore[arg-type]


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside, synced, then renamed: a reader of `path` sees the old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with open(beside, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: Any) -> None:
    """Indented, keys in the order given, one newline at the end."""
    write_file(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def inside(directory: Path, file: Path) -> bool:
    """Whether `file`, symbolic links followed, lies in `directory`.

    The one exception is the hub's cache, where `snapshots/REVISION/*` are links into `blobs/` beside it.
    """
    real, target = directory.resolve(), file.resolve()
    if real in target.parents:
        return True
    return real.parent.name == "snapshots" and target.parent == real.parent.parent / "blobs"


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an error of the disk into a `DscError` that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fix = "free some space, then the same command goes on" if full else "check the disk, then start again"
        raise DscError(f"{path}: {error.strerror}", fix) from None

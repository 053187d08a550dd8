"""Files of a checkpoint directory: hashed, read as JSON, written and renamed, disk errors in one line."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import blake3
import numpy as np
from torch import Tensor

from deepseek_compress import limits
from deepseek_compress.errors import DscError

SEAL = "checksum"  # the last key of a sealed file: BLAKE3 of the file with zeros in its place
_UNSEALED = "0" * 64
_END = f'{_UNSEALED}"\n}}\n'.encode()
_SURROGATE = re.compile(rb"\\\\u[dD][89a-fA-F]")
_READ = 512 << 10  # bytes at a time: they stay in the cache between reading and hashing


def read_bytes(path: Path, limit: int = limits.JSON_BYTES) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; `DscError` for a pipe, a device, and all that
    fails."""
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > limit:
                raise DscError(f"{path}: {size} bytes, {limit} at most are read", "give another file")
            return file.read(limit + 1)
    except OSError as error:
        raise DscError(f"{path}: {error.strerror}", "check that the file is there and can be read") from None


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file to read; a pipe, which would never end, and a device are an OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(fd, "rb", buffering=0)


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object from a file; `DscError` where there is none."""
    return parse_json(path, read_bytes(path))


def parse_json(path: Path, content: bytes) -> dict[str, Any]:
    """Return the JSON object that `content` of the file `path` is."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DscError(f"{path}: not valid JSON ({error})", "download the file again") from None
    if not isinstance(value, dict):
        raise DscError(f"{path}: not a JSON object", "download the file again")
    if _SURROGATE.search(content):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise DscError(f"{path}: an unpaired UTF-16 surrogate", "write the file as UTF-8") from None
    return value


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum of the file as its last key: `read_sealed` notices any flipped bit of it."""
    content = json_text({**value, SEAL: _UNSEALED})
    seal = blake3.blake3(content).hexdigest().encode()
    write_file(path, content[: -len(_END)] + seal + b'"\n}\n')


def read_sealed(path: Path, strict: bool = True) -> dict[str, Any]:
    """Return what `write_sealed` wrote, without the checksum. `DscError` where the file has changed.

    strict: False takes a file of schema 1 without a checksum, which earlier versions wrote.
    """
    content = read_bytes(path)
    value = parse_json(path, content)
    if not strict and SEAL not in value and value.get("schema") == 1:
        return value
    seal = str(value.pop(SEAL, ""))
    unsealed = content[: -len(_END)] + _END
    if not content.endswith(f'{seal}"\n}}\n'.encode()) or blake3.blake3(unsealed).hexdigest() != seal:
        raise DscError(f"{path}: not the bytes that were written", "make this output again")
    return value


def kept(path: Path) -> dict[str, Any] | None:
    """Return what an interrupted run wrote with `write_sealed`; None where there is nothing, or it is damaged."""
    try:
        return read_sealed(path)
    except DscError:
        return None


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
        """Add the bytes of the file from `place` on; those that come a second time are left out."""
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
        with disk_errors(self.file), open_regular(self.file) as file:
            file.seek(self._place)
            for block in blocks(file.fileno(), count):
                self._hash.update(block)
                self._place += len(block)


def fill(fd: int, view: memoryview, offset: int, what: str) -> None:
    """Read the bytes of an open file from `offset` on into all of `view`; `what` names it where it ends before."""
    done = 0
    while done < len(view):
        got = os.preadv(fd, [view[done:]], offset + done)
        if got == 0:
            raise ended(what)
        done += got


def ended(what: str) -> DscError:
    """Return what to say of a file that is shorter than it was."""
    return DscError(f"{what} ends early", "the file changed while it was read; start again")


def blocks(fd: int, count: int | None = None) -> Iterator[memoryview]:
    """Yield the rest of an open file, or its next `count` bytes, through one reused buffer.

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
    """Write a temporary file, sync, then rename: a reader of `path` sees the old content or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    with disk_errors(path):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync(path.parent)
        except BaseException:
            remove(temporary)
            raise


def write_json(path: Path, value: Any) -> None:
    """Indented, keys in the order given, one newline at the end."""
    write_file(path, json_text(value))


def json_text(value: Any) -> bytes:
    """Return the text that `write_json` writes."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8")


def remove(path: Path) -> None:
    """Delete one of our files, where it is there. All that is deleted goes through this function and the next two."""
    path.unlink(missing_ok=True)


def remove_empty(path: Path) -> None:
    """Delete a directory of ours, if it is empty."""
    if not any(path.iterdir()):
        path.rmdir()


def remove_tree(path: Path) -> None:
    """Delete one of our directories with everything in it, where it is there."""
    shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Make a file's content, or the renames in a directory, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def inside(directory: Path, file: Path) -> bool:
    """Whether `file`, symbolic links followed, lies in `directory`.

    The one exception is the hub's cache, where `snapshots/REVISION/*` are links into `blobs/` next to it.
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
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) or " requested and " in str(error)  # as numpy says it
        fix = (
            "free some space, then run the same command again to resume" if full else "check the disk, then start again"
        )
        said = error.strerror or ("No space left on device" if full else str(error))
        raise DscError(f"{path}: {said}", fix) from None

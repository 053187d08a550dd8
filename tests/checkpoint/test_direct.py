"""Writing past the page cache gives the bytes that were handed in, whatever the file system thinks of it."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deepseek_compress.checkpoint import direct
from deepseek_compress.checkpoint.direct import ALIGNMENT, DirectFile, read_back
from deepseek_compress.errors import DscError

HEAD = bytes(range(256)) * (ALIGNMENT // 256)


def written(path: Path, pieces: list[bytes], threaded: bool = True, checked: bool = True) -> bytes:
    """The file at `path` after `pieces`, which is what `read_back` gives too."""
    with ThreadPoolExecutor(1) as thread:
        file = DirectFile(path, ALIGNMENT, thread if threaded else None, checked)
        for piece in pieces:
            file.write(memoryview(piece))
        file.finish(HEAD)
    found = b"".join(bytes(block) for block in read_back(path))
    assert found == path.read_bytes()
    return found


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(0, 3 * ALIGNMENT), max_size=8), threaded=st.booleans(), checked=st.booleans())
def test_pieces_of_any_size_come_back(
    sizes: list[int], threaded: bool, checked: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pieces = [os.urandom(size) for size in sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "_BLOCK", 2 * ALIGNMENT)
        path = tmp_path_factory.mktemp("direct") / "file"
        assert written(path, pieces, threaded, checked) == HEAD + b"".join(pieces)


@pytest.mark.parametrize("refuses", ["open", "pwrite", "preadv", "readv"])
def test_a_file_system_without_it_gets_ordinary_calls(
    refuses: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(os, refuses)

    def refused(first: int | str, *rest: object) -> object:
        flags = rest[0] if refuses == "open" else direct.fcntl.fcntl(first, direct.fcntl.F_GETFL)
        if flags & os.O_DIRECT:  # type: ignore[operator]
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(first, *rest)

    monkeypatch.setattr(direct.os, refuses, refused)
    pieces = [os.urandom(5_000_001), b"end"]
    assert written(tmp_path / "file", pieces) == HEAD + b"".join(pieces)


def test_short_writes_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.pwrite
    monkeypatch.setattr(direct.os, "pwrite", lambda fd, view, place: real(fd, view[:ALIGNMENT], place))
    piece = os.urandom(100_000)
    assert written(tmp_path / "file", [piece]) == HEAD + piece


@pytest.mark.parametrize("place", [7, ALIGNMENT + 7, ALIGNMENT + 5_000_000], ids=["head", "first block", "rest"])
def test_what_comes_back_wrong_is_told(place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.preadv

    def flipped(fd: int, views: list[memoryview], start: int) -> int:
        got = real(fd, views, start)
        if start <= place < start + got:
            views[0][place - start] ^= 1
        return got

    monkeypatch.setattr(direct.os, "preadv", flipped)
    with pytest.raises(DscError, match="reads back other bytes than were written; check the disk"):
        written(tmp_path / "file", [bytes(5_000_001)])


def test_what_the_thread_could_not_write_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct.os, "pwrite", full)
    with ThreadPoolExecutor(1) as thread:
        file = DirectFile(tmp_path / "file", ALIGNMENT, thread)
        file.write(memoryview(bytes(direct._BLOCK)))
        with pytest.raises(OSError, match="No space left"):
            file.finish(HEAD)
        file.close()

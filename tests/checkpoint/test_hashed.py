"""The hash of a file that is taken from what is read of it is that of the file, whatever is read and in which order."""

from __future__ import annotations

from pathlib import Path

import blake3
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_compress.checkpoint import files, open_checkpoint
from deepseek_compress.checkpoint.files import FileHash, hash_file
from deepseek_compress.checkpoint.hashed import Hashed

BYTES = bytes(range(256)) * 9


@given(st.lists(st.tuples(st.integers(0, len(BYTES)), st.integers(0, 999)), max_size=9))
def test_pieces_that_pass_by(tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]]) -> None:
    """Gaps are read, what came before is left out; a piece that reaches back into it is read from where it ends."""
    file = tmp_path_factory.getbasetemp() / "bytes"
    file.write_bytes(BYTES)
    found = FileHash(file)
    for place, count in spans:
        found.saw(place, memoryview(BYTES)[place : place + count])
    assert found.hexdigest() == hash_file(file) == blake3.blake3(BYTES).hexdigest()


def test_what_passed_by_is_not_read_again(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    file.write_bytes(BYTES)
    found = FileHash(file)
    for place in range(0, len(BYTES), 256):
        found.saw(place, memoryview(BYTES)[place : place + 256])
    file.write_bytes(b"")
    assert found.hexdigest() == blake3.blake3(BYTES).hexdigest()


@pytest.mark.parametrize("model", ["tiny_v3", "tiny_llama"])
def test_a_checkpoint_that_is_read(model: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_READ", 1000)
    source = open_checkpoint(request.getfixturevalue(model))
    for names in (list(source.header.tensors), sorted(source.header.tensors), list(source.header.tensors)[5:9]):
        for file in {place.file for info in source.header.tensors.values() for place in info.parts.values()}:
            hashed = Hashed(source.header, FileHash(file))
            for number, name in enumerate(names):
                places = source.header.tensors[name].parts
                if number % 3:
                    assert hashed.read(name).equal(source.read(name))
                else:
                    for place in places.values():
                        assert sum(map(len, hashed.pieces(place))) == place.bytes
            assert hashed.hash.hexdigest() == blake3.blake3(file.read_bytes()).hexdigest()

"""Tensors that are read ahead: the same values, no more than there is room for, copied before they are asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.checkpoint import ahead as module
from deepseek_compress.checkpoint.ahead import Ahead
from deepseek_compress.models import Architecture
from tests.strict_device import strict_device

STRICT = torch.device("strict:0")


@pytest.fixture
def source(tiny_v3: Path) -> Checkpoint:
    return open_checkpoint(tiny_v3)


def names(source: Checkpoint) -> list[str]:
    return [name for block in Architecture.of(source).blocks for name in block.in_order(experts=True)]


def test_the_order_has_every_tensor_once(source: Checkpoint) -> None:
    blocks = Architecture.of(source).blocks
    found = blocks[1].in_order(experts=True)
    assert sorted(found) == sorted(blocks[1].prefix + name for name in blocks[1].tensors)
    assert len(set(found)) == len(found)
    places = [next(i for i, name in enumerate(found) if part in name) for part in ("norm", "q_a_proj", "experts.0")]
    assert places == sorted(places)
    left_out = set(found) - set(blocks[1].in_order(experts=False))
    assert left_out == {name for name in found if ".experts." in name}


def test_they_are_there_before_they_are_asked_for(source: Checkpoint) -> None:
    wanted = names(source)
    stored = sum(len(source.header.tensors[name].parts) for name in wanted)
    with strict_device() as counts, Ahead(source, wanted, STRICT) as ahead:
        ahead.finish()
        for number, name in enumerate(wanted):
            parts = ahead.take(name)
            assert parts is not None
            assert counts["copies"] == stored + number, "the first that was asked for started the copies of all"
            decoded = source.decoded(name, parts)
            assert decoded.device == STRICT
            assert decoded.cpu().equal(source.read(name))  # a copy more
        assert ahead._bytes == 0


def test_no_more_than_there_is_room_for(source: Checkpoint) -> None:
    wanted = names(source)
    limit = 3 * max(source.header.tensors[name].bytes for name in wanted)
    with strict_device(), Ahead(source, wanted, STRICT, limit) as ahead:
        for name in wanted:
            ahead.finish()
            held = sum(part.nbytes for read in ahead._read.values() for part in read.parts.values())
            assert 0 < held == ahead._bytes <= limit
            assert ahead.take(name) is not None
        assert ahead._bytes == 0


def test_one_that_is_larger_than_the_room_is_read_alone(source: Checkpoint) -> None:
    wanted = names(source)
    with strict_device(), Ahead(source, wanted, STRICT, 1) as ahead:
        for name in wanted[:12]:
            ahead.finish()
            assert list(ahead._read) == [name]
            assert ahead.take(name) is not None


def test_another_order(source: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for before it was read is left to who asks; what nobody asks for makes room in time."""
    monkeypatch.setattr(module, "SLACK", 4)
    wanted = names(source)
    with strict_device(), Ahead(source, wanted, STRICT, 1) as ahead:
        ahead.finish()
        assert ahead.take(wanted[3]) is None
        assert ahead.take("lm_head.weight") is None
        assert list(ahead._read) == [wanted[0]]
        assert ahead.take(wanted[5]) is None
        ahead.finish()
        assert list(ahead._read) == [wanted[1]], "the first came five too late"
        assert ahead.take(wanted[1]) is not None
        ahead.finish()
        assert ahead.take(wanted[2]) is not None
        ahead.finish()
        assert list(ahead._read) == [wanted[4]], "what was taken elsewhere is not read again"


def test_a_file_that_ends_early_is_told_by_who_asks(tiny_v3: Path, tmp_path: Path) -> None:
    source = open_checkpoint(shutil.copytree(tiny_v3, tmp_path / "copy"))
    wanted = names(source)
    (shard, *_) = {part.file for name in wanted for part in source.header.tensors[name].parts.values()}
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size // 2)
    with strict_device(), Ahead(source, wanted, STRICT) as ahead:
        ahead.finish()
        missing = [name for name in wanted if ahead.take(name) is None]
    assert missing
    with pytest.raises(Exception, match=r"changed|ends early"):
        source.read(missing[0])
    assert ahead._bytes == 0


def test_it_ends_with_its_context(source: Checkpoint) -> None:
    with strict_device(), Ahead(source, names(source), STRICT, 1) as ahead:
        assert ahead._thread.is_alive()
    assert not ahead._thread.is_alive()
    assert not ahead._read

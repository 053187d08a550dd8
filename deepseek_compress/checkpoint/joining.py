"""Shards that a run wrote block by block, so that it can be resumed, as one file: a small model needs no 31 of them.

The parts stay until the output is finished: an interrupted writer takes them up again and joins them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path

from deepseek_compress.checkpoint.files import blocks, disk_errors, open_regular
from deepseek_compress.checkpoint.header import Location, read_shard_header
from deepseek_compress.checkpoint.ledger import STREAMED, Ledger, OpenShard
from deepseek_compress.checkpoint.reader import read_tensor
from deepseek_compress.checkpoint.shards import ELEMENT
from deepseek_compress.errors import raise_problems


def join(path: Path, parts: Sequence[tuple[Path, Ledger]], thread: Executor) -> Ledger:
    """Write the tensors of `parts`, shard after shard, to the file `path`, read back and compared like any shard."""
    places: dict[str, Location] = {}
    for file, _ in parts:
        found, problems = read_shard_header(file)
        raise_problems(problems)
        places |= found
    outline = {name: (place.dtype, place.shape) for name, place in places.items()}
    whole = OpenShard(path, thread, outline)
    try:
        for _, ledger in parts:
            whole.stored |= ledger.stored
        for name, place in places.items():
            if place.bytes < STREAMED or place.bytes % ELEMENT:
                whole.file.add(name, read_tensor(place, name))
            else:
                whole.file.stream(name, place, _pieces(place))
        return whole.close(fact for _, ledger in parts for fact in ledger.facts)
    except BaseException:
        whole.discard()
        raise


def _pieces(place: Location) -> Iterator[memoryview]:
    with disk_errors(place.file), open_regular(place.file) as file:
        file.seek(place.offset)
        yield from blocks(file.fileno(), place.bytes)

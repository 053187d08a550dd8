"""The block loop: the only place that goes through a model's blocks and reads their weights.

    read ahead -> visit (run, collect, act, write) -> advance -> free

A loop carries the hidden states of one text through the blocks of one model, or of several side by side. What happens
at a block is up to a visitor: it reads the stored inputs of that block, fills the outputs, and returns facts. A
finished block is never repeated: its output and its facts are in the work directory, and an interrupted loop resumes at
the first block that has none, or at the last before it whose inputs are intact. The hidden state is saved, not computed
again, since recomputing it is not bit-identical. Memory holds no more than the visitor keeps of one block.

`backward` runs from the last block to the first; what is handed on then is a gradient. Without a work directory all
stays in memory and nothing can be resumed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from deepseek_compress import machine
from deepseek_compress.checkpoint.files import kept, read_sealed, write_sealed
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture, Block
from deepseek_compress.streaming.batches import Batches
from deepseek_compress.streaming.hidden_store import HiddenStore

READ_AHEAD = 256 << 20  # bytes of the next block that are asked of the disk while this one computes

Facts = dict[str, Any]
Progress = Callable[[int, int, str], None]


def silent(done: int, total: int, note: str) -> None:
    """Report nothing."""


class Stream(NamedTuple):
    """A model, and the name of its hidden states' files."""

    architecture: Architecture
    name: str = "hidden"


class Visit(NamedTuple):
    """A block as a visitor gets it: one entry of each tuple for every stream."""

    layer: int
    blocks: tuple[Block, ...]
    before: tuple[HiddenStore, ...]
    after: tuple[HiddenStore, ...]  # to be filled; empty where nobody reads what the block gives
    batches: Batches


class Visitor(Protocol):
    """Work at each block."""

    def visit(self, at: Visit) -> Facts:
        """Fill `at.after` and return facts, which JSON can hold."""
        ...


@dataclass(frozen=True)
class Loop:
    """Carry the hidden states of a text through the blocks of each stream's model.

    tokens: int64 (samples, length), every sample from position 0; with `paired` each sample is there twice.
    """

    streams: tuple[Stream, ...]
    tokens: Tensor
    work: Path | None  # None: in memory, nothing is resumed
    name: str = "facts"  # of the facts' files
    note: str = "block"  # of the progress
    paired: bool = False  # see `paired_forward`
    together: int = 1  # see `Batches`
    last: bool = False  # the last block's output is wanted
    keep: bool = False  # the inputs of finished blocks stay
    backward: bool = False
    shared: bool = False  # other processes read the stores
    first: int = 0  # block to begin with, whose inputs the caller gives
    here: bool = True  # this process reads the routed experts, no other

    @property
    def layers(self) -> int:
        """Number of blocks."""
        return len(self.streams[0].architecture.blocks)

    def run(
        self,
        visitor: Visitor,
        progress: Progress = silent,
        finished: Callable[[int], bool] = lambda layer: True,
        begin: Callable[[Stream, HiddenStore], None] | None = None,
        given: tuple[HiddenStore, ...] = (),
    ) -> list[Facts]:
        """Visit every block that is not finished; returns the facts of all.

        finished: whether what the visitor writes of a block is there too. begin: fills the first store, instead of the
        embedding. given: the first stores of a loop in memory.
        """
        machine.settle()
        if self.work is not None:
            self.work.mkdir(parents=True, exist_ok=True)
        order = range(self.first, self.layers)[:: -1 if self.backward else 1]
        done = [self._done(layer) and finished(layer) for layer in order]
        start = done.index(False) if False in done else len(done)
        while start and start < len(order) and self.work is not None and not self._intact(order[start]):
            start -= 1
        left = order[start:]
        found: dict[int, Facts] = {}
        before = given or (self._inputs(left[0], left[0] == order[0], begin) if left else ())
        with ExitStack() as stack:
            for model in self._architectures():
                stack.enter_context(model.reading.of(model, [model.blocks[layer] for layer in left], self.here))
            for number, layer in enumerate(left, len(order) - len(left)):
                progress(number, len(order), f"{self.note} {layer}")
                if layer != left[-1]:
                    following = left[left.index(layer) + 1]
                    _read_ahead([architecture.blocks[following] for architecture in self._architectures()])
                before = self._block(layer, before, visitor, found)
        self._close(before)
        progress(len(order), len(order), f"{self.note}s done")
        return [found[layer] if self.work is None else self._facts(layer) for layer in sorted(order)]

    def output(self, stream: Stream) -> HiddenStore:
        """Open the stored output of the last block (of the first one, where the loop runs backward)."""
        path = self.path(stream, self.first if self.backward else self.layers)
        return self._opened(stream, path)

    def path(self, stream: Stream, place: int) -> Path:
        """Where the states before block `place` lie, or after the last block."""
        assert self.work is not None
        return self.work / f"{stream.name}-{place:05d}.f32"

    def _block(
        self, layer: int, before: tuple[HiddenStore, ...], visitor: Visitor, found: dict[int, Facts]
    ) -> tuple[HiddenStore, ...]:
        """Visit a block; returns the next one's inputs, durable."""
        target = layer if self.backward else layer + 1
        wanted = self.last or target not in (0, self.layers)
        after = tuple(self._new(stream) for stream in self.streams) if wanted else ()
        blocks = tuple(stream.architecture.blocks[layer] for stream in self.streams)
        batches = Batches(self.tokens, self.paired, self.together, blocks[0].architecture.device)
        facts = visitor.visit(Visit(layer, blocks, before, after, batches))
        self._close(before)
        if self.work is None:
            found[layer] = facts
            return after
        for stream, store in zip(self.streams if after else (), after, strict=True):
            store.rename(self.path(stream, target))
        write_sealed(self._facts_path(layer), facts)
        if not self.keep:
            for store in before:
                store.remove()
        return after

    def _architectures(self) -> list[Architecture]:
        """Each of the models once."""
        return list({id(stream.architecture): stream.architecture for stream in self.streams}.values())

    def _close(self, stores: Sequence[HiddenStore]) -> None:
        if self.work is not None:
            for store in stores:
                store.close()

    def _inputs(
        self, layer: int, start: bool, begin: Callable[[Stream, HiddenStore], None] | None
    ) -> tuple[HiddenStore, ...]:
        """Open the inputs of block `layer`: from an interrupted run, or made now."""
        place = layer + 1 if self.backward else layer
        return tuple(self._input(stream, place, start, begin or self.embed) for stream in self.streams)

    def _input(
        self, stream: Stream, place: int, start: bool, begin: Callable[[Stream, HiddenStore], None]
    ) -> HiddenStore:
        if self.work is not None:
            path = self.path(stream, place)
            if not start:  # `run` has seen that it is there
                return self._opened(stream, path)
            with suppress(OSError, DscError):
                kept_store = self._opened(stream, path)
                if kept_store.intact():
                    return kept_store
        store = self._new(stream)
        begin(stream, store)
        if self.work is not None:
            store.rename(path)
        return store

    def _intact(self, layer: int) -> bool:
        """Whether what enters a block is there as it was written."""
        place = layer + 1 if self.backward else layer
        try:
            for stream in self.streams:
                with self._opened(stream, self.path(stream, place)) as store:
                    if not store.intact():
                        return False
        except DscError:
            return False
        return True

    def embed(self, stream: Stream, store: HiddenStore) -> None:
        """Fill `store` with the first block's input."""
        architecture = stream.architecture
        table = architecture.table(architecture.embedding)
        batches = Batches(self.tokens)
        for batch in range(len(batches)):
            batches.write(store, batch, architecture.embed(table, batches.ids(batch)))

    def _new(self, stream: Stream) -> HiddenStore:
        path = None if self.work is None else self.work / f"{stream.name}.tmp"
        resident, device = 0 if self.shared else None, stream.architecture.device
        return HiddenStore(path, self.tokens.numel(), stream.architecture.row_shape, resident=resident, device=device)

    def _opened(self, stream: Stream, path: Path) -> HiddenStore:
        resident, device = 0 if self.shared else None, stream.architecture.device
        return HiddenStore(path, self.tokens.numel(), stream.architecture.row_shape, True, resident, device)

    def _facts_path(self, layer: int) -> Path:
        assert self.work is not None
        return self.work / f"{self.name}-{layer:05d}.json"

    def _done(self, layer: int) -> bool:
        if self.work is None or kept(self._facts_path(layer)) is None:
            return False
        target = layer if self.backward else layer + 1
        wanted = self.last if target in (0, self.layers) else self.keep
        return not wanted or self._intact(target - self.backward)

    def _facts(self, layer: int) -> Facts:
        return read_sealed(self._facts_path(layer))


def _read_ahead(blocks: Sequence[Block]) -> None:
    """Ask the disk for the tensors of `blocks`, up to READ_AHEAD bytes, while this process computes."""
    places = [
        place
        for block in blocks
        for name in block.tensors
        if (info := block.architecture.header.tensors.get(block.prefix + name))
        for place in info.parts.values()
    ]

    def ask() -> None:
        left = READ_AHEAD
        for place in places:
            left -= place.bytes
            if left < 0:
                return
            with suppress(OSError):  # the read itself says what is wrong
                handle = os.open(place.file, os.O_RDONLY)
                os.posix_fadvise(handle, place.offset, place.bytes, os.POSIX_FADV_WILLNEED)
                os.close(handle)

    Thread(target=ask, daemon=True).start()

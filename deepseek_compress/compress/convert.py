"""Compress a checkpoint block by block: with text through the block loop, without it shard by shard (`data_free`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from cuda_ops import ops
from deepseek_compress import machine, provenance
from deepseek_compress.checkpoint import CheckpointWriter
from deepseek_compress.checkpoint.files import remove_tree
from deepseek_compress.checkpoint.ledger import OpenShard
from deepseek_compress.compress import data_free, row_tables
from deepseek_compress.compress.ends import Ends
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.loss import Loss, judged, measure
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.streaming.forward import run_block
from deepseek_compress.streaming.loop import Facts, Loop, Progress, Stream, Visit, silent
from deepseek_compress.workers import Pool


class Writer(Protocol):
    """Where blocks go, one after the other."""

    @property
    def written(self) -> frozenset[str]:
        """Tensors of blocks that are safe on the disk."""
        ...

    def add_raw(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Take what the job stores."""
        ...

    def keep(self, name: str) -> None:
        """Take a tensor of the source as it is."""
        ...

    def append(self, name: str, write: Callable[[OpenShard], None]) -> None:
        """Take a tensor that `write` puts into a shard by itself."""
        ...

    def flush(self) -> None:
        """Make what came so far safe."""
        ...

    def in_sequence(self) -> None:
        """Forget what an interrupted run wrote after something that is damaged: blocks come one after the other."""
        ...


class Done(NamedTuple):
    """Result of a conversion."""

    blocks: list[Facts]  # {"linears": [facts], "experts": {"tokens": [per expert], "starved": [...]}}
    hashes: dict[str, str]  # BLAKE3 of the source's files that its manifest does not list
    tables: list[Facts]  # of embedding and head, where they change
    loss: Loss | None = None  # where the job is judged


@torch.no_grad()
def convert(
    job: Job,
    writer: CheckpointWriter,
    pool: Pool,
    tokens: Tensor | None = None,
    progress: Progress = silent,
    judging: Progress = silent,
) -> Done:
    """Write every tensor of the source to `writer`, changed where the job wants it.

    pool: who computes tasks; it shares `job`. tokens: int64 (samples, length) of calibration text; None: no block is
    run. The caller finishes the writer and then calls `clean`.
    """
    if isinstance(job.solver, LinearSolver) and job.solver.weights is not None:
        ops.load()  # compiled on first use: before the time left is counted
    if tokens is not None:
        return convert_with_text(job, writer, pool, tokens, progress, judging)
    job.work.mkdir(parents=True, exist_ok=True)
    machine.settle()
    return Done(*data_free.convert(job, writer, pool, progress))


@torch.no_grad()
def convert_with_text(
    job: Job, writer: Writer, pool: Pool, tokens: Tensor, progress: Progress = silent, judging: Progress = silent
) -> Done:
    """`convert` with text: each block is run, and what comes of it goes to `writer`."""
    plain, stream = tokens, Stream(job.architecture)
    if job.paired:
        tokens = tokens.repeat_interleave(2, dim=0)
    writer.in_sequence()
    visitor = _Solve(job, writer, pool)
    visitor.keep(_around(job, before=True))
    ends = Ends(job, tokens, visitor.store)
    begin = ends.before()
    loop = Loop((stream,), tokens, job.work, paired=job.paired, last=ends.last or job.judged,
                here=pool.here)  # fmt: skip
    blocks = loop.run(visitor, progress, visitor.finished, begin)
    ends.after(loop)
    visitor.keep(_around(job, before=False))
    loss = None
    if job.judged:
        with loop.output(stream) as changed:
            loss = measure(job, plain[: judged(*plain.shape)], changed, judging)
    files = provenance.unhashed(job.source)
    hashes = {file.name: found for file, found in zip(files, pool.run(_hash, files), strict=True)}
    tables = [fact for block in blocks for fact in block.pop("tables", [])]
    return Done(blocks, hashes, ends.facts + tables, loss)


def clean(job: Job) -> None:
    """Remove what only an interrupted run needs."""
    remove_tree(job.work)


@dataclass
class _Solve:
    """Changes the linears of each block and writes all of its tensors."""

    job: Job
    writer: Writer
    pool: Pool
    written: frozenset[str] = field(init=False)  # tensors that an interrupted run left in finished shards
    again: bool = False  # the block that is visited was written by an interrupted run, under whatever names

    def __post_init__(self) -> None:
        self.written = self.writer.written

    def visit(self, at: Visit) -> Facts:
        """Solve a block."""
        block, changed = at.blocks[0], self.job.changed(at.blocks[0])
        self.keep([block.prefix + name for name in block.tensors if block.prefix + name not in changed])
        following = at.after[0] if at.after else None
        self.again = self.finished(at.layer)
        facts = run_block(self.job, at.layer, at.before[0], at.batches, following, self.store, self.pool)
        self.again = False
        self.writer.flush()
        mine = [name for name in self.job.rows if name.startswith(block.prefix)]
        tables = [row_tables.facts(self.job.source, name, self.job.rows[name]) for name in mine]
        return {**facts, "tables": tables} if tables else facts

    def finished(self, layer: int) -> bool:
        """Whether all tensors of a block are in finished shards."""
        block = self.job.architecture.blocks[layer]
        return {block.prefix + name for name in block.tensors} <= self.written

    def keep(self, names: list[str]) -> None:
        """Write tensors that do not change, unless an interrupted run did."""
        for name in names:
            if name in self.written:
                continue
            if name in self.job.rows:
                table = partial(row_tables.write, name=name, how=self.job.rows[name], work=self.job.work)
                self.writer.append(name, partial(table, source=self.job.source))
            elif self.job.untouched(name):
                self.writer.append(name, partial(OpenShard.untouched, source=self.job.source, name=name))
            else:
                self.writer.keep(name)

    def store(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Write a tensor that changes, unless an interrupted run did."""
        if name not in self.written and not self.again:
            self.writer.add_raw(name, parts)


def _hash(job: Job, file: Path) -> str:
    return provenance.hash_file(file)


def _around(job: Job, before: bool) -> list[str]:
    """Tensors that belong to no block and do not change: the embedding before them, the others after."""
    blocks = tuple(block.prefix for block in job.architecture.blocks)
    outside = sorted(info.name for info in job.tensors() if not info.name.startswith(blocks))
    outside = [name for name in outside if name not in job.tables]
    return [name for name in outside if (name == job.architecture.embedding) == before]

"""THE block loop: read a block, feed calibration batches, collect, solve, write, advance, free.

A finished block is never repeated: its shard is closed, the hidden state it gives lies in the work directory, and its
facts beside it. An interrupted run goes on at the first block that is not finished and gives the same bytes, because
the hidden state is saved, not computed again. Nothing is held but one block's attention, or one expert a worker.
Without calibration no block is run, and the shards are tasks: see `data_free`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deepseek_compress import machine, provenance
from deepseek_compress.blocks import data_free
from deepseek_compress.blocks.calibrated import Batches, calibrated_block, embedded, row_shape
from deepseek_compress.blocks.job import Block, Change, Job, Solved
from deepseek_compress.blocks.spool import Spool
from deepseek_compress.checkpoint import CheckpointWriter
from deepseek_compress.checkpoint.files import read_json, write_json
from deepseek_compress.checkpoint.writer import PARTIAL
from deepseek_compress.errors import DscError
from deepseek_compress.workers import Pool

__all__ = ["Block", "Change", "Done", "Job", "Solved", "claim", "clean", "run_blocks", "run_text"]


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

    def flush(self) -> None:
        """Make what came so far safe."""
        ...


class Done(NamedTuple):
    """What a run of the loop found."""

    blocks: list[dict[str, Any]]  # {"linears": [facts], "experts": {"tokens": [per expert], "starved": [...]}}
    hashes: dict[str, str]  # BLAKE3 of the source's files that its manifest does not list


def _silent(done: int, total: int, note: str) -> None:
    return None


@dataclass(frozen=True)
class _Run:
    """A calibrated job under way."""

    job: Job
    writer: Writer
    written: frozenset[str]  # tensors that an interrupted run left in finished shards
    tokens: Tensor
    pool: Pool

    def store(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Write a tensor, unless an interrupted run did."""
        if name not in self.written:
            self.writer.add_raw(name, parts)

    def keep(self, name: str) -> None:
        """Write a tensor that does not change, unless an interrupted run did."""
        if name not in self.written:
            self.writer.keep(name)


@torch.no_grad()
def run_blocks(
    job: Job,
    writer: CheckpointWriter,
    pool: Pool,
    tokens: Tensor | None = None,
    progress: Callable[[int, int, str], None] = _silent,
) -> Done:
    """Write every tensor of `job.source` to `writer`, changed where the job wants it.

    pool: who computes tasks; it shares `job`. tokens: int64 (samples, length) of calibration text; None: no block is
    run. The caller finishes the writer and then calls `clean`.
    """
    if tokens is not None:
        return run_text(job, writer, pool, tokens, progress)
    job.work.mkdir(parents=True, exist_ok=True)
    machine.settle()
    return Done(*data_free.convert(job, writer, pool, progress))


@torch.no_grad()
def run_text(
    job: Job, writer: Writer, pool: Pool, tokens: Tensor, progress: Callable[[int, int, str], None] = _silent
) -> Done:
    """`run_blocks` with text: each block is run, and what comes of it goes to `writer`."""
    job.work.mkdir(parents=True, exist_ok=True)
    machine.settle()
    if job.paired:
        tokens = tokens.repeat_interleave(2, dim=0)
    run = _Run(job, writer, writer.written, tokens, pool)
    total = job.cfg.num_hidden_layers
    first = _first_unfinished(run)
    for name in _around(job, before=True):
        run.keep(name)
    hidden = _hidden(run, first) if first < total else None
    for layer in range(first, total):
        progress(layer, total, f"block {layer}")
        hidden = _block(run, layer, hidden)
        _spooled(job, layer).unlink(missing_ok=True)
    for name in _around(job, before=False):
        run.keep(name)
    progress(total, total, "blocks done")
    blocks = [json.loads(_facts(job, layer).read_text(encoding="utf-8")) for layer in range(total)]
    files = provenance.unhashed(job.source)
    return Done(blocks, {file.name: found for file, found in zip(files, pool.run(_hash, files), strict=True)})


def _hash(job: Job, file: Path) -> str:
    return provenance.hash_file(file)


def claim(out: Path, work: Path, identity: Mapping[str, Any]) -> None:
    """Call before the writer is made: refuse to go on with an unfinished output of something else.

    `identity` is what the bytes follow from: knobs, model, text, versions. Raises DscError with what differs.
    """
    file = work / "identity.json"
    here = json.loads(json.dumps(identity))
    if file.is_file():
        there = read_json(file)
        differing = sorted(key for key in {*here, *there} if here.get(key) != there.get(key))
        if differing:
            what = f"{out}: holds an unfinished run with other {', '.join(differing)}"
            raise DscError(what, "give the same again to go on, or another output directory")
    elif (out / PARTIAL).is_dir() and any((out / PARTIAL).iterdir()):
        raise DscError(f"{out}: holds an unfinished output that cannot be gone on with", f"remove {out}")
    work.mkdir(parents=True, exist_ok=True)
    write_json(file, here)


def clean(job: Job) -> None:
    """Remove what only an interrupted run needs."""
    shutil.rmtree(job.work, ignore_errors=True)


def _block(run: _Run, layer: int, hidden: Spool | None) -> Spool | None:
    """Change a block; gives the spool of the next one's input, durable."""
    assert hidden is not None
    job = run.job
    changed = job.changed(layer)
    for name in job.family.block_tensors(job.cfg, layer):
        full = f"{job.family.prefix(layer)}.{name}"
        if full not in changed:
            run.keep(full)
    last = layer + 1 == job.cfg.num_hidden_layers
    following = None if last else Spool(job.work / "following.tmp", hidden.rows, hidden.row_shape)
    batches = Batches(run.tokens, job.paired)
    facts = calibrated_block(job, layer, hidden, batches, following, run.store, run.pool)
    hidden.close()
    if following is not None:
        following.rename(_spooled(job, layer + 1))
    write_json(_facts(job, layer), facts)
    run.writer.flush()
    return following


def _hidden(run: _Run, layer: int) -> Spool:
    """The input of block `layer` for all samples: from the interrupted run, or the embeddings."""
    job, tokens = run.job, run.tokens
    path = _spooled(job, layer)
    if path.is_file():
        return Spool(path, tokens.numel(), row_shape(job.family, job.cfg), existing=True)
    if layer:
        raise DscError(f"{path}: missing, block {layer} cannot go on", "remove the output and start again")
    spool = embedded(job, tokens)
    spool.rename(path)
    return spool


def _first_unfinished(run: _Run) -> int:
    """The first block that is not in finished shards with its facts."""
    job = run.job
    for layer in range(job.cfg.num_hidden_layers):
        prefix = job.family.prefix(layer) + "."
        names = {prefix + name for name in job.family.block_tensors(job.cfg, layer)}
        if not (names <= run.written and _facts(job, layer).is_file()):
            return layer
    return job.cfg.num_hidden_layers


def _around(job: Job, before: bool) -> list[str]:
    """Tensors of the checkpoint that belong to no block: the embedding before them, the others after."""
    blocks = tuple(job.family.prefix(layer) + "." for layer in range(job.cfg.num_hidden_layers))
    outside = sorted(info.name for info in job.tensors() if not info.name.startswith(blocks))
    return [name for name in outside if (name == job.family.embedding) == before]


def _facts(job: Job, layer: int) -> Path:
    return job.work / f"facts-{layer:05d}.json"


def _spooled(job: Job, layer: int) -> Path:
    return job.work / f"hidden-{layer:05d}.f32"

"""Without calibration: the output's shards are tasks, each read, changed, written and read back by one worker.

A shard holds what lies together in the source, so that a disk is read in order. Which tensors go into which shard
follows from the source alone; an interrupted run goes on with the shards that are not finished. A file of the source is
hashed while it is still in the page cache.

Four-bit round-to-nearest is done by the native kernel (see `packing`); every other method decodes a weight first.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_compress import provenance
from deepseek_compress.blocks import packing
from deepseek_compress.blocks.job import Block, Job
from deepseek_compress.blocks.stored import packed, stored16
from deepseek_compress.checkpoint import CheckpointWriter
from deepseek_compress.checkpoint.header import TensorInfo, stored_name
from deepseek_compress.checkpoint.ledger import OpenShard
from deepseek_compress.checkpoint.shards import Outline
from deepseek_compress.models.config import Linear
from deepseek_compress.workers import Pool

SHARDS = 16  # as many tasks of a large model, so that workers end together,
SMALLEST, LARGEST = 128 << 20, 5 << 30  # while a shard takes this many bytes of the source


class _Task(NamedTuple):
    number: int
    path: Path  # of the shard
    names: list[str]
    changed: dict[str, tuple[int, Linear]]  # those that change: block and linear


def convert(
    job: Job, writer: CheckpointWriter, pool: Pool, progress: Callable[[int, int, str], None]
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Write every tensor of `job.source`, changed where the job wants it.

    Returns {"linears": [facts]} by block, and the hashes of the source's files.
    """
    tasks = _tasks(job, writer)
    hashes = {}
    progress(0, len(tasks), "shards")
    for done, (task, result) in enumerate(zip(tasks, pool.run(_do, tasks), strict=True), 1):
        if isinstance(task, _Task):
            writer.take(task.number)
        else:
            hashes[task.name] = str(result)
        progress(done, len(tasks), "shards")
    found = {fact["name"]: fact for ledger in writer.ledgers for fact in ledger.facts}
    return [{"linears": _in_order(job, layer, found)} for layer in range(job.cfg.num_hidden_layers)], hashes


def _tasks(job: Job, writer: CheckpointWriter) -> list[_Task | Path]:
    """The unfinished shards, and after the last that reads from it each file that has to be hashed."""
    changed = {
        name: (layer, linear)
        for layer in range(job.cfg.num_hidden_layers)
        for name, linear in job.changed(layer).items()
    }
    shards = [
        _Task(number, writer.shard_path(number), names, {name: changed[name] for name in names if name in changed})
        for number, names in enumerate(planned(job), 1)
    ]
    last = {file: task.number for task in shards for name in task.names for file in _files(job, name)}
    tasks: list[_Task | Path] = []
    unhashed = provenance.unhashed(job.source)
    for task in shards:
        if not writer.has(task.number):
            tasks.append(task)
        tasks += [file for file in unhashed if last.get(file) == task.number]
    return [*tasks, *(file for file in unhashed if file not in last)]


def _files(job: Job, name: str) -> set[Path]:
    return {part.file for part in job.source.header.tensors[name].parts.values()}


def planned(job: Job) -> list[list[str]]:
    """Names of the tensors of each shard."""
    wanted = sorted(job.tensors(), key=_place)
    total = sum(info.bytes for info in wanted)
    limit = min(max(total // SHARDS, SMALLEST), LARGEST)
    shards: list[list[str]] = []
    filled = limit
    for info in wanted:
        if filled >= limit:
            shards.append([])
            filled = 0
        shards[-1].append(info.name)
        filled += info.bytes
    return shards


def _place(info: TensorInfo) -> tuple[str, int]:
    part = min(info.parts.values(), key=lambda place: -place.bytes)
    return part.file.name, part.offset


def _do(job: Job, task: _Task | Path) -> str | None:
    """Runs in a worker."""
    if isinstance(task, Path):
        return provenance.hash_file(task)
    _shard(job, task)
    return None


def _shard(job: Job, task: _Task) -> None:
    facts: list[dict[str, Any]] = []
    with ThreadPoolExecutor(max_workers=1) as thread:
        shard = OpenShard(task.path, thread, _outline(job, task))
        try:
            for name in task.names:
                if name in task.changed:
                    parts, fact = _convert(job, *task.changed[name])
                    shard.add(name, parts)
                    facts.append(fact)
                else:
                    shard.keep(job.source, name)
            shard.close(facts)
        except BaseException:
            shard.discard()
            raise


def _outline(job: Job, task: _Task) -> Outline | None:
    """What the shard will hold; None where a method or an encoding tells that only afterwards."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in task.names:
        info = job.source.header.tensors[name]
        changed = task.changed.get(name)
        rounding = packing.rounding(job, *changed) if changed else None
        if rounding is None and (changed or info.encoding == "mxfp4"):
            return None
        coming = stored16(info) if rounding is None else packed(info, rounding)
        found |= {stored_name(name, suffix): (part.dtype, part.shape) for suffix, part in coming.parts.items()}
    return found


def _convert(job: Job, layer: int, linear: Linear) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The new weight as it is stored, and the facts about it."""
    rounding = packing.rounding(job, layer, linear)
    if rounding is not None:
        return packing.pack(job, layer, linear, rounding)
    stored: list[dict[str, Tensor]] = []
    block = Block(job, layer, lambda name, parts: stored.append(parts))
    block.read(linear.name + ".weight", exact=True)
    block.solve([linear], job.saved(layer, linear))
    return stored[0], block.facts[0]


def _in_order(job: Job, layer: int, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    names = (f"{job.family.prefix(layer)}.{linear.name}" for linear in job.family.linears(job.cfg, layer))
    return [found[name] for name in names if name in found]

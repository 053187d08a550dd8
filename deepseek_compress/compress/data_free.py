"""Without calibration: the output's shards are tasks, each read, changed, written and read back by one worker.

A shard holds what lies together in one file of the source, so that a disk is read in order; a small model becomes one
shard. Which tensors go into which shard follows from the source alone; an interrupted run continues with the shards
that are not finished. Where there are files enough for the workers, a task is all shards of a file, which is hashed
from what is read for them; else a file is hashed while it is still in the page cache. Four-bit round-to-nearest is
done by the native kernel (see `packing`); every other method decodes a weight first.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_compress import provenance
from deepseek_compress.checkpoint import Checkpoint, CheckpointWriter
from deepseek_compress.checkpoint.files import FileHash
from deepseek_compress.checkpoint.hashed import Hashed
from deepseek_compress.checkpoint.header import Location, TensorInfo, module_of, stored_name
from deepseek_compress.checkpoint.ledger import OpenShard
from deepseek_compress.checkpoint.shards import Outline
from deepseek_compress.compress import ends, packing, row_tables
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.layout import packed, stored16
from deepseek_compress.compress.passes import of_parts
from deepseek_compress.models import Block, Linear
from deepseek_compress.numerics.types import WeightQuantizer
from deepseek_compress.planning.passes import Steps
from deepseek_compress.workers import Pool

SHARDS = 16  # as many tasks of a large model, so that workers end together,
SMALLEST, LARGEST = 128 << 20, 5 << 30  # while a shard takes this many bytes of the source
FILES_A_WORKER = 2  # so that workers end together where they share out files


class _Shard(NamedTuple):
    number: int
    path: Path
    names: list[str]
    changed: dict[str, tuple[int, Linear]]  # those that change: block and linear


class _Task(NamedTuple):
    shards: list[_Shard]  # unfinished ones
    file: Path | None = None  # of the source, to be hashed

    @property
    def parts(self) -> list[str]:
        """Tensors of its shards, and the file."""
        names = [name for shard in self.shards for name in shard.names]
        return names if self.file is None else [*names, self.file.name]


def convert(
    job: Job, writer: CheckpointWriter, pool: Pool, progress: Callable[[int, int, str], None]
) -> tuple[list[dict[str, Any]], dict[str, str], list[dict[str, Any]]]:
    """Write every tensor of `job.source`, changed where the job wants it.

    Returns {"linears": [facts]} by block, the hashes of the source's files, and the facts about embedding and head.
    """
    tasks, hashes, seconds = _tasks(job, writer, pool.count), {}, of_parts(job)
    steps = Steps(progress, [sum(seconds[name] for name in task.parts) for task in tasks], "shards")
    do = partial(_do, each=lambda name: steps.part(seconds[name])) if pool.here else _do
    for task, hashed in zip(tasks, pool.run(do, tasks), strict=True):
        for shard in task.shards:
            writer.take(shard.number)
        if task.file is not None:
            hashes[task.file.name] = str(hashed)
        steps.done()
    found = {fact["name"]: fact for ledger in writer.ledgers for fact in ledger.facts}
    tables = [found[name] for name in map(_module, [*job.tables, *job.rows]) if name in found]
    return [{"linears": _in_order(block, found)} for block in job.architecture.blocks], hashes, tables


def _tasks(job: Job, writer: CheckpointWriter, workers: int) -> list[_Task]:
    """Return what is left to do, in the order of the source's files."""
    changed = {
        name: (layer, linear)
        for layer, block in enumerate(job.architecture.blocks)
        for name, linear in job.changed(block).items()
    }
    tasks, number = [], 0
    files, unhashed = planned(job), set(provenance.unhashed(job.source))
    together = type(job.source) is Checkpoint and len(files) >= FILES_A_WORKER * workers
    for file in sorted({*files, *unhashed}):
        shards = []
        for names in files.get(file, []):
            number += 1
            if not writer.has(number):
                mine = {name: changed[name] for name in names if name in changed}
                shards.append(_Shard(number, writer.shard_path(number), names, mine))
        hashed = file if file in unhashed else None
        if together:
            tasks.append(_Task(shards, hashed))
        else:
            tasks += [*(_Task([shard]) for shard in shards), _Task([], hashed)]
    return [task for task in tasks if task.shards or task.file]


def planned(job: Job) -> dict[Path, list[list[str]]]:
    """Names of the tensors of each shard, by the file of the source that they are read from, or begin with."""
    ordered = sorted(job.tensors(), key=lambda info: (_main(info).file, _main(info).offset))
    total = sum(info.bytes for info in ordered)
    limit = min(max(total // SHARDS, SMALLEST), LARGEST)
    wanted: dict[Path, list[TensorInfo]] = {}
    for info in ordered:
        wanted.setdefault(_main(info if total > SMALLEST else ordered[0]).file, []).append(info)
    return {file: _cut(infos, limit) for file, infos in wanted.items()}


def _cut(infos: list[TensorInfo], limit: int) -> list[list[str]]:
    """Parts of about the same size, a little above `limit` bytes of the source at most."""
    size = sum(info.bytes for info in infos)
    share, done = size / -(-size // limit), 0
    parts: list[list[str]] = []
    for info in infos:
        if done >= share * len(parts):
            parts.append([])
        parts[-1].append(info.name)
        done += info.bytes
    return parts


def _main(info: TensorInfo) -> Location:
    return max(info.parts.values(), key=lambda place: place.bytes)


def _do(job: Job, task: _Task, each: Callable[[str], None] = lambda name: None) -> str | None:
    """Run in a worker; `each` is called for every finished tensor."""
    hashed = None if task.file is None else FileHash(task.file)
    if hashed and task.shards:
        job = replace(job, architecture=job.architecture.on(Hashed(job.source.header, hashed)))
    for shard in task.shards:
        _write(job, shard, each)
    return None if hashed is None else hashed.hexdigest()


def _write(job: Job, shard: _Shard, each: Callable[[str], None] = lambda name: None) -> None:
    facts: list[dict[str, Any]] = []
    with ThreadPoolExecutor(max_workers=1) as thread:
        file = OpenShard(shard.path, thread, _outline(job, shard))
        try:
            for name in shard.names:
                if name in shard.changed:
                    parts, fact = _convert(job, *shard.changed[name])
                    file.add(name, parts)
                    facts.append(fact)
                elif name in job.rows:
                    row_tables.write(file, job.source, name, job.rows[name], job.work)
                    facts.append(row_tables.facts(job.source, name, job.rows[name]))
                elif job.untouched(name):
                    file.untouched(job.source, name)
                elif name in job.tables:
                    parts, fact = ends.rounded_parts(job, name)
                    file.add(name, parts)
                    facts.append(fact)
                else:
                    file.keep(job.source, name)
                each(name)
            file.close(facts)
        except BaseException:
            file.discard()
            raise


def _outline(job: Job, shard: _Shard) -> Outline | None:
    """Return what the shard will hold; None where a method or an encoding tells that only afterwards."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in shard.names:
        info = job.source.header.tensors[name]
        changed = shard.changed.get(name)
        rounding: WeightQuantizer | None = job.tables.get(name) or job.rows.get(name)
        if changed:
            rounding = packing.rounding(job, job.architecture.blocks[changed[0]], changed[1])
        if rounding is None and not job.untouched(name) and (changed or info.encoding == "mxfp4"):
            return None
        coming = info if job.untouched(name) else stored16(info) if rounding is None else packed(info, rounding)
        found |= {stored_name(name, suffix): (part.dtype, part.shape) for suffix, part in coming.parts.items()}
    return found


def _convert(job: Job, layer: int, linear: Linear) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the new weight as it is stored, and the facts about it."""
    block = job.architecture.blocks[layer]
    rounding = packing.rounding(job, block, linear)
    if rounding is not None:
        return packing.pack(job, block, linear, rounding)
    stored: list[dict[str, Tensor]] = []
    solved = job.begin(layer, lambda name, parts: stored.append(parts))
    solved.read(linear.name + ".weight", exact=True)
    solved.solve([linear], job.saved(block, linear))
    return stored[0], solved.facts[0]


def _module(name: str) -> str:
    return module_of(name)[0]


def _in_order(block: Block, found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    names = (block.prefix + linear.name for linear in block.linears)
    return [found[name] for name in names if name in found]

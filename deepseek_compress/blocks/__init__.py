"""THE block loop: read a block, feed calibration batches, collect, solve, write, advance, free.

A finished block is never repeated: its shard is closed, the hidden state it gives lies in the work directory, and its
facts beside it. An interrupted run goes on at the first block that is not finished and gives the same bytes, because
the hidden state is saved, not computed again. Nothing is held but one block's attention, or one expert.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepseek_compress.blocks.calibrated import BATCH_TOKENS, Batches, calibrated_block
from deepseek_compress.blocks.job import Block, Change, Job, Solved, copy
from deepseek_compress.blocks.spool import Spool
from deepseek_compress.checkpoint.files import read_json, write_json
from deepseek_compress.checkpoint.writer import PARTIAL
from deepseek_compress.errors import DscError
from deepseek_compress.numerics.types import Statistics

__all__ = ["Change", "Job", "Solved", "claim", "clean", "run_blocks"]


@torch.no_grad()
def run_blocks(job: Job) -> list[dict[str, Any]]:
    """Write every tensor of `job.source` to `job.writer`, changed where the job wants it. Returns facts by block.

    {"linears": [{"name", "role", ...}], "experts": {"tokens": [per expert], "starved": [...]}}; the caller finishes the
    writer and then calls `clean`.
    """
    job.work.mkdir(parents=True, exist_ok=True)
    job = dataclasses.replace(job, written=job.writer.written)
    if job.paired and job.tokens is not None:
        job = dataclasses.replace(job, tokens=job.tokens.repeat_interleave(2, dim=0))
    total = job.cfg.num_hidden_layers
    first = _first_unfinished(job)
    for name in _around(job, before=True):
        copy(job, name)
    hidden = _hidden(job, first) if job.tokens is not None and first < total else None
    for layer in range(first, total):
        job.progress(layer, total, f"block {layer}")
        if hidden is None:
            facts = _free_block(job, layer)
        else:
            hidden, facts = _calibrated(job, layer, hidden)
        write_json(_facts(job, layer), facts)
        job.writer.flush()
        _spooled(job, layer).unlink(missing_ok=True)
    for name in _around(job, before=False):
        copy(job, name)
    job.progress(total, total, "blocks done")
    return [json.loads(_facts(job, layer).read_text(encoding="utf-8")) for layer in range(total)]


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


def _free_block(job: Job, layer: int) -> dict[str, Any]:
    """Change the linears of a block one by one, without running it."""
    block = Block(job, layer)
    block.copy_rest()
    for linear in block.linears:
        if block.wants(linear):
            block.read(linear.name + ".weight", exact=True)
            block.solve([linear], Statistics())
            block.free([linear])
    return {"linears": block.facts}


def _calibrated(job: Job, layer: int, hidden: Spool) -> tuple[Spool, dict[str, Any]]:
    """Change a block; gives the spool of the next one's input, durable, and the facts."""
    if job.tokens is None:
        raise ValueError("no calibration tokens")
    last = layer + 1 == job.cfg.num_hidden_layers
    following = None if last else Spool(job.work / "following.tmp", hidden.rows, hidden.row_shape)
    facts = calibrated_block(job, layer, hidden, Batches(job.tokens, job.paired), following)
    hidden.close()
    if following is None:
        return hidden, facts
    following.rename(_spooled(job, layer + 1))
    return following, facts


def _hidden(job: Job, layer: int) -> Spool:
    """The input of block `layer` for all samples: from the interrupted run, or the embeddings."""
    if job.tokens is None:
        raise ValueError("no calibration tokens")
    shape = _row_shape(job)
    path = _spooled(job, layer)
    if path.is_file():
        return Spool(path, job.tokens.numel(), shape, existing=True)
    if layer:
        raise DscError(f"{path}: missing, block {layer} cannot go on", "remove the output and start again")
    table = job.source.read(job.family.embedding, dtype=None)  # as stored: float32 would take twice the memory
    spool = Spool(job.work / "embedded.tmp", job.tokens.numel(), shape)
    step = max(1, BATCH_TOKENS // job.tokens.shape[1])
    for start in range(0, len(job.tokens), step):
        rows = job.family.embed(job.cfg, table, job.tokens[start : start + step]).float()
        spool.write(start * job.tokens.shape[1], rows.flatten(0, 1))
    spool.rename(path)
    return spool


def _row_shape(job: Job) -> tuple[int, ...]:
    probe = job.family.embed(job.cfg, torch.empty(1, job.cfg.hidden_size), torch.zeros(1, 1, dtype=torch.long))
    return tuple(probe.shape[2:])


def _first_unfinished(job: Job) -> int:
    """The first block that is not in finished shards with its facts."""
    for layer in range(job.cfg.num_hidden_layers):
        prefix = job.family.prefix(layer) + "."
        names = {prefix + name for name in job.family.block_tensors(job.cfg, layer)}
        if not (names <= job.written and _facts(job, layer).is_file()):
            return layer
    return job.cfg.num_hidden_layers


def _around(job: Job, before: bool) -> list[str]:
    """Tensors of the checkpoint that belong to no block: the embedding before them, the others after."""
    blocks = tuple(job.family.prefix(layer) + "." for layer in range(job.cfg.num_hidden_layers))
    dropped = set() if job.keep_mtp else set(job.family.mtp_tensors(job.cfg))
    known = set(job.family.tensors(job.cfg)) | {job.family.head}
    outside = [name for name in job.source.header.tensors if not name.startswith(blocks)]
    wanted = [name for name in sorted(outside) if name in known and name not in dropped]
    return [name for name in wanted if (name == job.family.embedding) == before]


def _facts(job: Job, layer: int) -> Path:
    return job.work / f"facts-{layer:05d}.json"


def _spooled(job: Job, layer: int) -> Path:
    return job.work / f"hidden-{layer:05d}.f32"

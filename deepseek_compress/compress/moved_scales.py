"""Scales that move between linears and what makes their inputs, found before anything is rounded.

The calibration text runs once through the model as it is (`streaming.collect`), unless its statistics were saved. The
scales are kept in the work directory, so that an interrupted run has them. The result computes the
same: where a tensor of 16 bits takes part, scales are powers of two, and where a norm is divided, they are those of the
rounded norm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.checkpoint.files import write_arrays
from deepseek_compress.checkpoint.transformed import Transformed, transformed
from deepseek_compress.compress.accumulate import Accumulator
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.models import Architecture, Block
from deepseek_compress.models.folds import Fold, folds
from deepseek_compress.numerics.migration import Migration, power_of_two
from deepseek_compress.streaming.collect import Collector, Look, collect_inputs, feeding
from deepseek_compress.streaming.loop import Facts, Progress

Scales = dict[str, Tensor]  # producer by checkpoint name -> float32, what its channels are divided by


@dataclass(frozen=True)
class Rescale:
    """Multiplies the rows and columns of a weight, or the entries of a vector."""

    rows: Tensor | None = None  # float32 (rows,)
    columns: Tensor | None = None  # float32 (columns,)

    def __call__(self, tensor: Tensor) -> Tensor:
        """float32 (rows, columns) or (rows,)."""
        if self.rows is not None:
            tensor = tensor * (self.rows if tensor.dim() == 1 else self.rows[:, None])
        return tensor if self.columns is None else tensor * self.columns


def migrate(job: Job, tokens: Tensor | None, method: Migration, progress: Progress) -> Job:
    """`job` on a source with the scales moved that `method` finds.

    It looks at `tokens` int64 (samples, length), or at the statistics of the job, which then are of the moved model.
    """
    source = migrated(job.architecture, find(job, tokens, method, progress))
    moved = replace(job, architecture=job.architecture.on(source), statistics=None)
    if job.statistics is None or not job.solver.needs:  # what solves without them would read them for nothing
        return moved
    divided = {}
    for block in job.architecture.blocks:
        for linear in block.linears:
            change = source.changes.get(f"{block.prefix}{linear.name}.weight")
            if isinstance(change, Rescale) and change.columns is not None:
                divided[block.prefix + linear.input] = change.columns
    return replace(moved, statistics=job.statistics.over(divided))


@torch.no_grad()
def find(job: Job, tokens: Tensor | None, method: Migration, progress: Progress) -> Scales:
    """Find scales for every place that `method` serves; `tokens` int64 (samples, length) of calibration text."""
    job.work.mkdir(parents=True, exist_ok=True)
    if tokens is not None:
        collect_inputs(job.architecture, tokens[: method.samples], job.work, "scales", _Sums(job, method), progress)
    else:
        for block in job.architecture.blocks:
            progress(block.layer, len(job.architecture.blocks), f"scales of block {block.layer}")
            if not _file(job, block).is_file():
                _from_statistics(job, method, block)
    found: Scales = {}
    for block in job.architecture.blocks:
        with np.load(_file(job, block)) as saved:
            found |= {name: torch.from_numpy(saved[name]) for name in saved.files}
    return found


def _file(job: Job, block: Block) -> Path:
    return job.work / f"scales-{block.layer:05d}.npz"


class _Sums(Collector):
    """Sums the inputs of the linears behind each fold, and finds its scales."""

    def __init__(self, job: Job, method: Migration) -> None:
        self.job, self.method = job, method
        self.served: list[tuple[Fold, Accumulator]] = []

    def begin(self, block: Block) -> Look:
        """Sum what the linears of each fold see."""
        served = [fold for fold in folds(block) if self.method.streams or fold.router is None]
        self.served = [(fold, Accumulator(self.method.needs)) for fold in served]
        return feeding({name: sums for fold, sums in self.served for name in _seen(fold)})

    def end(self, block: Block) -> Facts:
        """Keep the scales of the block."""
        found: Scales = {}
        for fold, sums in self.served:
            if sums.tokens:
                kept = [self.method.kept(block.read(f"{name}.weight")) for name in fold.linears]
                found_scales = self.method.scales(kept, sums.statistics(block.prefix + fold.linears[0])).cpu()
                scales = _of_producer(fold, found_scales)
                found[block.prefix + fold.producer] = _movable(self.job, block, fold, scales)
        write_arrays(_file(self.job, block), found)
        return {}


def _from_statistics(job: Job, method: Migration, block: Block) -> None:
    """Find the scales of a block from what was collected before."""
    sums = _Sums(job, method)
    sums.begin(block)
    for fold, total in sums.served:
        for linear in block.linears:
            if linear.name in _seen(fold):
                total.merge(job.saved(block, linear))
    sums.end(block)


def _seen(fold: Fold) -> tuple[str, ...]:
    """Linears whose inputs are looked at: all of them see the same, but experts only their own tokens."""
    return fold.linears if fold.router else fold.linears[:1]


def _of_producer(fold: Fold, scales: Tensor) -> Tensor:
    """Of each column -> of each row of the producer that makes columns: the largest of them."""
    if fold.rows is None:
        return scales
    chosen, place = torch.unique(fold.rows, return_inverse=True)
    return torch.zeros(len(chosen)).scatter_reduce(0, place, scales, "amax")


def _movable(job: Job, block: Block, fold: Fold, scales: Tensor) -> Tensor:
    """`scales` so that moving them changes nothing but float32 roundings."""
    solver = job.solver
    linears = {linear.name: linear for linear in block.linears}
    takes_part = [name for name in (fold.producer, *fold.linears) if name in linears]
    rounded = isinstance(solver, LinearSolver) and solver.weights is not None and fold.router is None
    if not rounded or not all(solver.wants(block, linears[name]) for name in takes_part):
        return power_of_two(scales)
    if fold.producer in linears:
        return scales
    norm = block.read(f"{fold.producer}.weight", None).cpu()
    divided = (norm.float() / scales).to(norm.dtype).float()
    return torch.where(divided != 0, norm.float() / divided, torch.ones_like(scales))


def migrated(architecture: Architecture, scales: Mapping[str, Tensor]) -> Transformed:
    """Return the checkpoint with the scales moved."""
    changes: dict[str, Rescale] = {}
    for block in architecture.blocks:
        for fold in folds(block):
            if block.prefix + fold.producer in scales:
                _fold(architecture.source, block.prefix, fold, scales[block.prefix + fold.producer], changes)
    return transformed(architecture.source, changes)


def _fold(source: Checkpoint, prefix: str, fold: Fold, scales: Tensor, changes: dict[str, Rescale]) -> None:
    """Divide what makes the channels, multiply the columns that read them."""
    producer = f"{prefix}{fold.producer}.weight"
    made, columns = 1 / scales, scales
    if fold.rows is not None:
        chosen, place = torch.unique(fold.rows, return_inverse=True)
        columns = scales[place]
        made = torch.ones(source.header.tensors[producer].shape[0])
        made[chosen] = 1 / scales
    for name in (producer, f"{prefix}{fold.producer}.bias"):
        if name in source.header.tensors:
            changes[name] = replace(changes.get(name, Rescale()), rows=made)
    for reader in (*fold.linears, *([fold.router] if fold.router else [])):
        name = f"{prefix}{reader}.weight"
        changes[name] = replace(changes.get(name, Rescale()), columns=columns)

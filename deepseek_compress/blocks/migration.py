"""Scales that move between linears and what makes their inputs, found before anything is rounded.

The calibration text runs once through the model as it is (see `walk`), unless its statistics were saved. The scales
are kept in the work directory, so that an interrupted run has them. The checkpoint that comes out computes the same:
where a tensor of 16 bits takes part, scales are powers of two, and where a norm is divided, they are those that the
rounded norm stands for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from deepseek_compress.blocks.change import LinearChange
from deepseek_compress.blocks.job import Job
from deepseek_compress.blocks.statistics import Accumulator
from deepseek_compress.blocks.walk import Run, walked
from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.files import write_arrays
from deepseek_compress.checkpoint.transformed import Transformed, transformed
from deepseek_compress.errors import DscError
from deepseek_compress.models import Family, ModelConfig
from deepseek_compress.models.folds import Fold, folds
from deepseek_compress.numerics.migration import Migration, power_of_two

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


def problems(header: Header) -> list[DscError]:
    """Why no scale can move."""
    packed = [name for name, info in header.tensors.items() if info.encoding == "packed"]
    if packed:
        return [DscError(f"migration: {packed[0]} and others are packed already", "start from the 16-bit model")]
    return []


def migrate(job: Job, tokens: Tensor | None, method: Migration, progress: Callable[[int, int, str], None]) -> Job:
    """`job` on a source with the scales moved that `method` finds.

    It looks at `tokens` int64 (samples, length), or at the statistics of the job, which then are of the moved model.
    """
    source = migrated(job.source, job.family, job.cfg, find(job, tokens, method, progress))
    if job.statistics is None or not job.change.needs:  # what solves without them would read them for nothing
        return replace(job, source=source, statistics=None)
    divided = {}
    for layer in range(job.cfg.num_hidden_layers):
        prefix = job.family.prefix(layer) + "."
        for linear in job.family.linears(job.cfg, layer):
            change = source.changes.get(f"{prefix}{linear.name}.weight")
            if isinstance(change, Rescale) and change.columns is not None:
                divided[prefix + linear.input] = change.columns
    return replace(job, source=source, statistics=job.statistics.over(divided))


@torch.no_grad()
def find(job: Job, tokens: Tensor | None, method: Migration, progress: Callable[[int, int, str], None]) -> Scales:
    """Scales for every place that `method` serves; `tokens` int64 (samples, length) of calibration text."""
    file = job.work / "migration.npz"
    if not file.is_file():
        found: Scales = {}
        total = job.cfg.num_hidden_layers
        runs: Iterable[tuple[int, Run | None]] = ((layer, None) for layer in range(total))
        for layer, run in runs if tokens is None else walked(job, tokens[: method.samples]):
            progress(layer, total, f"scales of block {layer}")
            found |= _block(job, layer, run, method)
        job.work.mkdir(parents=True, exist_ok=True)
        write_arrays(file, found)
    with np.load(file) as saved:
        return {name: torch.from_numpy(saved[name]) for name in saved.files}


def _block(job: Job, layer: int, run: Run | None, method: Migration) -> Scales:
    """The scales of block `layer`, which `run` runs over the text; without it, from the job's statistics."""
    prefix, source = job.family.prefix(layer) + ".", job.source
    served = [fold for fold in folds(job.family, job.cfg, layer) if method.streams or fold.router is None]
    sums = [Accumulator(method.needs) for _ in served]
    watched = {name: total for fold, total in zip(served, sums, strict=True) for name in _seen(fold)}

    def look(name: str, x: Tensor) -> None:
        if name in watched:
            watched[name].add(x)

    if run is not None:
        run(look)
    else:
        for linear in job.family.linears(job.cfg, layer):
            if linear.name in watched:
                watched[linear.name].merge(job.saved(layer, linear))
    found: Scales = {}
    for fold, total in zip(served, sums, strict=True):
        if total.tokens:
            kept = [method.kept(source.read(f"{prefix}{name}.weight")) for name in fold.linears]
            scales = _of_producer(fold, method.scales(kept, total.statistics(prefix + fold.linears[0])))
            found[prefix + fold.producer] = _movable(job, layer, fold, scales)
    return found


def _seen(fold: Fold) -> tuple[str, ...]:
    """Linears whose inputs are looked at: all of them see the same, but experts only their own tokens."""
    return fold.linears if fold.router else fold.linears[:1]


def _of_producer(fold: Fold, scales: Tensor) -> Tensor:
    """Of each column -> of each row of the producer that makes columns: the largest of them."""
    if fold.rows is None:
        return scales
    chosen, place = torch.unique(fold.rows, return_inverse=True)
    return torch.zeros(len(chosen)).scatter_reduce(0, place, scales, "amax")


def _movable(job: Job, layer: int, fold: Fold, scales: Tensor) -> Tensor:
    """`scales` so that moving them changes nothing but float32 roundings."""
    change = job.change
    linears = {linear.name: linear for linear in job.family.linears(job.cfg, layer)}
    takes_part = [name for name in (fold.producer, *fold.linears) if name in linears]
    rounded = isinstance(change, LinearChange) and change.weights is not None and fold.router is None
    if not rounded or not all(change.wants(layer, linears[name]) for name in takes_part):
        return power_of_two(scales)
    if fold.producer in linears:
        return scales
    norm = job.source.read(f"{job.family.prefix(layer)}.{fold.producer}.weight", None)
    divided = (norm.float() / scales).to(norm.dtype).float()
    return torch.where(divided != 0, norm.float() / divided, torch.ones_like(scales))


def migrated(source: Checkpoint, family: Family, cfg: ModelConfig, scales: Mapping[str, Tensor]) -> Transformed:
    """`source` with the scales moved."""
    changes: dict[str, Rescale] = {}
    for layer in range(cfg.num_hidden_layers):
        prefix = family.prefix(layer) + "."
        for fold in folds(family, cfg, layer):
            if prefix + fold.producer in scales:
                _fold(source, prefix, fold, scales[prefix + fold.producer], changes)
    return transformed(source, changes)


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

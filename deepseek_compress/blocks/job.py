"""What the block loop is asked to do, and what it does to one block: read, solve, store."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from deepseek_compress.blocks.pairs import PairedWeights, Split, only_changed
from deepseek_compress.blocks.spool import Spool
from deepseek_compress.blocks.statistics import Accumulator, Part, Watch, observe
from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.checkpoint.header import TensorInfo
from deepseek_compress.checkpoint.ledger import parts_of
from deepseek_compress.checkpoint.statistics import SavedStatistics, parts_of_statistics
from deepseek_compress.errors import DscError
from deepseek_compress.models.activations import InputScheme
from deepseek_compress.models.config import Linear, ModelConfig
from deepseek_compress.models.family import Family
from deepseek_compress.models.weights import QuantizedInputs, ResidentWeights, Weights
from deepseek_compress.numerics.hessian import Unsolvable
from deepseek_compress.numerics.types import Quantized, Statistics


class Solved(NamedTuple):
    """A linear's new weight as it is stored, and what there is to say about it."""

    stored: Tensor | Quantized
    facts: Mapping[str, Any]


class Change(Protocol):
    """What is done to the linears of a block."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Statistics`; without any, no block is run."""
        ...

    @property
    def min_tokens(self) -> int:
        """A linear whose input fewer tokens reached is solved without statistics."""
        ...

    def wants(self, layer: int, linear: Linear) -> bool:
        """Whether this linear changes."""
        ...

    def solve(self, layer: int, group: Sequence[tuple[Linear, Tensor]], statistics: Statistics) -> list[Solved]:
        """New weights for linears that share an input: float32 (rows, columns) each, not modified."""
        ...


@dataclass(frozen=True)
class Job:
    """What is done to a checkpoint: plain values, so that any process can do a part of it."""

    source: Checkpoint
    family: Family
    cfg: ModelConfig
    change: Change
    work: Path  # directory for spools, and for what an interrupted run needs to go on
    scheme: InputScheme | None = None  # how inputs of linears are rounded in the model that comes out
    keep_mtp: bool = True
    observing: bool = False  # the statistics are what is stored, and no linear changes
    statistics: SavedStatistics | None = None  # collected before; then no block is run

    @property
    def paired(self) -> bool:
        """Whether calibration shows every sample twice, once for each model: see `pairs`."""
        return "drift" in self.change.needs

    def saved(self, layer: int, linear: Linear) -> Statistics:
        """The statistics that were collected before for the input of `linear`; none without them."""
        if self.statistics is None:
            return Statistics()
        return self.statistics.read(f"{self.family.prefix(layer)}.{linear.input}")

    def tensors(self) -> Iterator[TensorInfo]:
        """Those of the source that go into the output."""
        dropped = set() if self.keep_mtp else set(self.family.mtp_tensors(self.cfg))
        known = set(self.family.tensors(self.cfg)) | {self.family.head}
        for name, info in self.source.header.tensors.items():
            if name in known and name not in dropped:
                yield info

    def changed(self, layer: int) -> dict[str, Linear]:
        """The linears of a block that change, by the name of their weight in the checkpoint."""
        return {
            f"{self.family.prefix(layer)}.{linear.name}.weight": linear
            for linear in self.family.linears(self.cfg, layer)
            if self.change.wants(layer, linear)
        }


Put = Callable[[Spool, int, Tensor], None]
Get = Callable[[Spool, int], Tensor]
Store = Callable[[str, dict[str, Tensor]], None]  # takes a tensor's name in the checkpoint and its stored parts


class Block:
    """One block of a job: its tensors while they are needed, what is new of them, and the facts about its linears."""

    def __init__(self, job: Job, layer: int, store: Store) -> None:
        self.job, self.layer, self.store = job, layer, store
        self.prefix = job.family.prefix(layer) + "."
        self.linears = job.family.linears(job.cfg, layer)
        self.tensors: dict[str, Tensor] = {}  # local name -> float32, with the values the output will load
        self.original: dict[str, Tensor] = {}  # the linears among them as they were, in a paired job
        self.facts: list[dict[str, Any]] = []
        self._roundings = {} if job.scheme is None else job.scheme.roundings(job.family, job.cfg, layer)

    def weights(self, watch: Watch = lambda weights: weights, split: Split | None = None) -> Weights:
        """The tensors as the finished model would use them; `watch` sees the inputs as the linears do.

        With `split`, the rows of the original model meet the original linears and are not rounded.
        """
        watched = watch(self.unrounded(split))
        found = self._roundings
        if split is not None:
            found = {name: only_changed(rounding, split) for name, rounding in found.items()}
        return QuantizedInputs(watched, found) if found else watched

    def unrounded(self, split: Split | None = None) -> Weights:
        """The same, for inputs that are rounded already."""
        weights = ResidentWeights(self.tensors)
        return weights if split is None else PairedWeights(weights, ResidentWeights(self.original), split)

    def wants(self, linear: Linear) -> bool:
        """Whether the job changes this linear."""
        return self.job.change.wants(self.layer, linear)

    def load(self, linears: Iterable[Linear]) -> None:
        """Read weights and biases: exact where the job changes them, otherwise as they will be stored."""
        for linear in linears:
            self.read(linear.name + ".weight", exact=self.wants(linear))
            if linear.name + ".bias" in self.names:
                self.read(linear.name + ".bias")
            if self.job.paired:
                names = (linear.name + ".weight", linear.name + ".bias")
                self.original.update({name: self.tensors[name] for name in names if name in self.tensors})

    @property
    def names(self) -> Mapping[str, tuple[int, ...]]:
        """The block's tensors by local name."""
        return self.job.family.block_tensors(self.job.cfg, self.layer)

    def read(self, name: str, exact: bool = False) -> None:
        """Read one tensor into memory."""
        # What stays 16-bit is written in BF16 where the source has FP8, and the next block must see that value
        tensor = self.job.source.read(self.prefix + name, torch.float32 if exact else None)
        self.tensors[name] = tensor.float() if tensor.is_floating_point() else tensor

    def free(self, linears: Iterable[Linear]) -> None:
        """Forget weights that are stored and no longer needed."""
        for linear in linears:
            for tensors in (self.tensors, self.original):
                tensors.pop(linear.name + ".weight", None)
                tensors.pop(linear.name + ".bias", None)

    def solve(self, group: Sequence[Linear], statistics: Statistics) -> None:
        """Give linears that share an input their new weights and write them; or only what was seen of that input."""
        if self.job.observing:
            self.store(self.prefix + group[0].input, parts_of_statistics(statistics))
            self.facts += [observed(linear, statistics) for linear in group]
            return
        if statistics.tokens < self.job.change.min_tokens:
            statistics = Statistics(tokens=statistics.tokens)
        pairs = [(linear, self.tensors[linear.name + ".weight"]) for linear in group]
        try:
            found = self.job.change.solve(self.layer, pairs, statistics)
        except Unsolvable as error:
            raise DscError(f"{self.prefix}{group[0].name}: {error.what}", error.fix) from None
        for (linear, _), solved in zip(pairs, found, strict=True):
            name = self.prefix + linear.name + ".weight"
            self.store(name, parts_of(name, solved.stored, self.job.scheme is not None))
            loaded = solved.stored.dequantize() if isinstance(solved.stored, Quantized) else solved.stored.float()
            self.tensors[linear.name + ".weight"] = loaded
            self.facts.append({"name": self.prefix + linear.name, "role": str(linear.role), **solved.facts})

    def solve_in_order(self, part: Part) -> None:
        """Solve the linears that change, each with the inputs that those before it give once they are changed."""
        for group in by_input(part.linears):
            wanted = [linear for linear in group if self.wants(linear)]
            if wanted:
                sums = Accumulator(self.job.change.needs)
                observe(part, frozenset(linear.name for linear in group), sums)
                if part.keep is not None and part.last in (linear.name for linear in group):
                    self.free(linear for linear in part.linears if linear not in group)  # they do not run again
                self.solve(wanted, sums.statistics(self.prefix + group[0].name))

    def solved(self, part: Part, path: Path, rows: int, put: Put, get: Get) -> Iterator[tuple[int, Tensor, bool]]:
        """Solve the linears of a part, then give (batch, what it computes, whether that is its last's output alone).

        The input of the last linear, `rows` rows in all, is kept in a spool at `path`, so that nothing before it runs
        again: `put(spool, batch, x)` writes that of a batch, `get(spool, batch)` reads it.
        """
        self.load(part.linears)
        last = next((linear for linear in part.linears if linear.name == part.last and self.wants(linear)), None)
        if last is None:
            self.solve_in_order(part)
            for batch in range(part.batches):
                yield batch, part.forward(lambda weights: weights, batch), False
        else:
            with Spool(path, rows, (last.columns,)) as kept:
                self.solve_in_order(replace(part, keep=lambda batch, x: put(kept, batch, x)))
                for batch in range(part.batches):
                    yield batch, self.unrounded(part.split(batch)).linear(part.last, get(kept, batch)), True
                kept.remove()
        self.free(part.linears)


def observed(linear: Linear, statistics: Statistics) -> dict[str, Any]:
    """What reached a linear: tokens, the largest and the mean magnitude, and how far the largest channel stands out."""
    facts: dict[str, Any] = {"name": linear.name, "role": str(linear.role), "tokens": statistics.tokens}
    largest, mean = statistics.input_absmax, statistics.input_absmean
    if largest is None or mean is None:
        return {**facts, "absmax": None, "absmean": None, "outlier": None}
    top, median = float(largest.max()), float(largest.median())
    return {**facts, "absmax": top, "absmean": float(mean.mean()), "outlier": top / median if median else None}


def by_input(linears: Sequence[Linear]) -> Iterator[list[Linear]]:
    """Linears that share an input, in the order in which they run."""
    keys = list(dict.fromkeys(linear.input for linear in linears))
    ordered = sorted(linears, key=lambda linear: keys.index(linear.input))
    for _, group in groupby(ordered, key=lambda linear: linear.input):
        yield list(group)

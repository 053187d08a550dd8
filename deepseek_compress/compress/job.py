"""A compression job, and its work on one block: read, collect, solve, store."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.checkpoint.header import TensorInfo
from deepseek_compress.checkpoint.ledger import parts_of
from deepseek_compress.checkpoint.statistics import SavedStatistics, parts_of_statistics
from deepseek_compress.compress.accumulate import Accumulator, collect
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture, Block, Linear, ModelConfig
from deepseek_compress.models.activations import InputScheme
from deepseek_compress.models.weights import Rows
from deepseek_compress.numerics.hessian import Unsolvable
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Quantized, Statistics, WeightQuantizer
from deepseek_compress.streaming.block_run import BlockRun, Part, Store
from deepseek_compress.streaming.hidden_store import HiddenStore


class Solved(NamedTuple):
    """A linear's new weight as it is stored, and what there is to say about it."""

    stored: Tensor | Quantized
    facts: Mapping[str, Any]


class Solver(Protocol):
    """Solves the linears of a block."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Statistics`; without any, no block is run."""
        ...

    @property
    def min_tokens(self) -> int:
        """A linear whose input fewer tokens reached is solved without statistics."""
        ...

    def wants(self, block: Block, linear: Linear) -> bool:
        """Whether this linear changes."""
        ...

    def solve(self, block: Block, group: Sequence[tuple[Linear, Tensor]], statistics: Statistics) -> list[Solved]:
        """Return new weights for linears that share an input: float32 (rows, columns) each, not modified."""
        ...


Group = Sequence[tuple[Linear, Tensor]]  # linears that share an input, and their weights


@runtime_checkable
class Together(Protocol):
    """A solver that takes several inputs at a time."""

    def solve_together(self, jobs: Sequence[tuple[Block, Group, Statistics]]) -> list[list[Solved]]:
        """`solve` for each of `jobs`, which have the same shapes: the same bits, in less time where a GPU solves."""
        ...


@dataclass(frozen=True)
class Job:
    """Description of a compression: plain values, so that any process can do a part of it."""

    architecture: Architecture
    solver: Solver
    work: Path  # directory for hidden stores, and for what an interrupted run needs to go on
    scheme: InputScheme | None = None  # how inputs of linears are rounded in the result
    keep_mtp: bool = True
    collecting: bool = False  # the statistics are what is stored, and no linear changes
    statistics: SavedStatistics | None = None  # collected before; then no block is run
    tables: Mapping[str, WeightQuantizer] = field(default_factory=dict)  # embedding and head that change, see `tables`
    rows: Mapping[str, Rtn] = field(default_factory=dict)  # Engram tables that change, see `row_tables`
    keep_vision: bool = True
    judged: bool = False  # what it cost on the text is measured at the end

    @property
    def source(self) -> Checkpoint:
        """The checkpoint that is compressed."""
        return self.architecture.source

    @property
    def cfg(self) -> ModelConfig:
        """Its configuration."""
        return self.architecture.cfg

    @property
    def paired(self) -> bool:
        """Whether calibration shows every sample twice, once for each model: see `paired_forward`."""
        return "cross_covariance" in self.solver.needs

    @property
    def min_tokens(self) -> int:
        """Experts that fewer tokens reach are reported."""
        return self.solver.min_tokens

    def at(self, device: str) -> Job:
        """Return the same job on another device."""
        return replace(self, architecture=self.architecture.at(device))

    def begin(self, layer: int, store: Store) -> SolvedBlock:
        """Take up a block; new weights go to `store`."""
        return SolvedBlock(self, self.architecture.blocks[layer], store)

    def saved(self, block: Block, linear: Linear) -> Statistics:
        """Read the saved statistics for the input of `linear`; empty ones where none were collected."""
        return Statistics() if self.statistics is None else self.statistics.read(block.prefix + linear.input)

    def tensors(self) -> Iterator[TensorInfo]:
        """Those of the source that go into the output."""
        architecture = self.architecture
        dropped = set() if self.keep_mtp else set(architecture.mtp)
        dropped |= set() if self.keep_vision else set(architecture.vision)
        known = set(architecture.tensors) | {architecture.cfg.names.head}
        for name, info in self.source.header.tensors.items():
            if name in known and name not in dropped:
                yield info

    def untouched(self, name: str) -> bool:
        """Whether a tensor of the source is written byte for byte."""
        return self.architecture.family.untouched(name) and name not in self.rows

    def changed(self, block: Block) -> dict[str, Linear]:
        """Return the linears of a block that change, by the name of their weight in the checkpoint."""
        wanted = (linear for linear in block.linears if self.solver.wants(block, linear))
        return {f"{block.prefix}{linear.name}.weight": linear for linear in wanted}


class SolvedBlock(BlockRun):
    """One block of a job: its tensors while they are needed, what is new of them, and the facts about its linears."""

    def __init__(self, job: Job, block: Block, store: Store) -> None:
        super().__init__(block, store, job.scheme)
        self.job = job

    def tables(self) -> Mapping[str, Rows]:
        """Return functions that gather rows of tables, as the output has them."""
        found, prefix = super().tables(), self.block.prefix
        changed = {name: self.job.rows[prefix + name] for name in found if prefix + name in self.job.rows}
        return {**found, **{name: partial(rounded_rows, found[name], how) for name, how in changed.items()}}

    def wants(self, linear: Linear) -> bool:
        """Whether the job changes this linear."""
        return self.job.solver.wants(self.block, linear)

    def acts(self, linears: Sequence[Linear]) -> bool:
        """Whether one of these linears changes."""
        return any(self.wants(linear) for linear in linears)

    def load(self, linears: Iterable[Linear]) -> None:
        """Read weights and biases: exact where the job changes them, otherwise as they will be stored."""
        for linear in linears:
            names = (linear.name + ".weight", linear.name + ".bias")
            self.read(names[0], exact=self.wants(linear))
            if names[1] in self.block.tensors:
                self.read(names[1])
            if self.job.paired:
                self.original.update({name: self.tensors[name] for name in names if name in self.tensors})

    def outputs(self, part: Part) -> Iterator[tuple[int, Tensor, bool]]:
        """Solve the linears of a part, then run it; the input of its last linear is kept, so that nothing before it
        runs again."""
        with self._kept(part) as kept:
            for wanted, statistics in self._to_solve(part, kept):
                self.solve(wanted, statistics)
            yield from self._solved(part, kept)

    def outputs_of(self, others: Sequence[tuple[BlockRun, Part]]) -> Iterator[tuple[int, Iterator[tuple[int, Tensor]]]]:
        """Solve the linears of the parts side by side, then run one part after the other."""
        with ExitStack() as stack:
            both = [(run, part) for run, part in others if isinstance(run, SolvedBlock)]
            kept = [stack.enter_context(run._kept(part)) for run, part in both]
            self._solve_together(both, kept)
            for number, ((run, part), inputs) in enumerate(zip(both, kept, strict=True)):
                yield number, ((batch, out) for batch, out, _ in run._solved(part, inputs))

    def act(self, part: Part) -> None:
        """Solve the linears of a part."""
        for wanted, statistics in self._to_solve(part):
            self.solve(wanted, statistics)
        self.free(part.linears)

    def act_on(self, others: Sequence[tuple[BlockRun, Part]]) -> None:
        """Solve the linears of the parts side by side."""
        both = [(run, part) for run, part in others if isinstance(run, SolvedBlock)]
        self._solve_together(both, [None] * len(both))
        for run, part in both:
            run.free(part.linears)

    @contextmanager
    def _kept(self, part: Part) -> Iterator[HiddenStore | None]:
        """Where the input of a part's last linear is kept; None where that does not change."""
        last = next((linear for linear in part.linears if linear.name == part.last and self.wants(linear)), None)
        if last is None:
            yield None
            return
        device = self.block.architecture.device
        with HiddenStore(part.path, part.rows, (last.columns,), device=device) as kept:
            yield kept
            kept.remove()

    def _solved(self, part: Part, kept: HiddenStore | None) -> Iterator[tuple[int, Tensor, bool]]:
        """Run a part whose linears are solved."""
        for batch in range(part.batches):
            if kept is None:
                yield batch, part.forward(lambda weights: weights, batch), False
            else:
                weights = self.unrounded(part.split(batch))
                yield batch, weights.linear(part.last, part.get(kept, batch)), True
        self.free(part.linears)

    def _solve_together(self, runs: Sequence[tuple[SolvedBlock, Part]], kept: Sequence[HiddenStore | None]) -> None:
        """Solve parts with the same linears, the n-th groups of all of them at a time."""
        each = [run._to_solve(part, inputs) for (run, part), inputs in zip(runs, kept, strict=True)]
        for step in zip(*each, strict=True):
            found = self._side_by_side([run for run, _ in runs], step)
            for (run, _), (wanted, statistics), solved in zip(runs, step, found, strict=True):
                run.solve(wanted, statistics, solved)

    def _side_by_side(
        self, runs: Sequence[SolvedBlock], step: Sequence[tuple[list[Linear], Statistics]]
    ) -> Sequence[list[Solved] | None]:
        """Solve groups that the solver takes together; None where each is to be solved by itself."""
        alone: list[list[Solved] | None] = [None] * len(runs)
        if self.job.collecting or not isinstance(self.job.solver, Together):
            return alone
        jobs = [
            (run.block, run._weights(wanted), self._enough(statistics))
            for run, (wanted, statistics) in zip(runs, step, strict=True)
        ]
        try:
            return self.job.solver.solve_together(jobs)
        except Unsolvable:
            return alone  # the one that fails is named then

    def _weights(self, group: Sequence[Linear]) -> Group:
        return [(linear, self.tensors[linear.name + ".weight"]) for linear in group]

    def _enough(self, statistics: Statistics) -> Statistics:
        """Those of an input that enough tokens reached; else their number alone."""
        few = statistics.tokens < self.job.min_tokens
        return Statistics(tokens=statistics.tokens) if few else statistics

    def _to_solve(self, part: Part, kept: HiddenStore | None = None) -> Iterator[tuple[list[Linear], Statistics]]:
        """Yield the linears that change and their input's statistics, once the caller has solved those before them."""
        self.load(part.linears)
        for group in by_input(part.linears):
            wanted = [linear for linear in group if self.wants(linear)]
            if wanted:
                sums = Accumulator(self.job.solver.needs)
                names = frozenset(linear.name for linear in group)
                keep = None if kept is None else lambda batch, x: part.put(kept, batch, x)
                collect(part, names, sums, keep)
                if kept is not None and part.last in names:
                    self.free(linear for linear in part.linears if linear not in group)  # they do not run again
                yield wanted, sums.statistics(self.block.prefix + group[0].name)

    def solve(self, group: Sequence[Linear], statistics: Statistics, found: list[Solved] | None = None) -> None:
        """Give linears that share an input their new weights and write them; or only what was seen of that input.

        found: the new weights, where they are known.
        """
        prefix = self.block.prefix
        if self.job.collecting:
            parts = parts_of_statistics(statistics)
            self.store(prefix + group[0].input, {suffix: part.cpu() for suffix, part in parts.items()})
            self.facts += [input_facts(linear, statistics) for linear in group]
            return
        try:
            found = found or self.job.solver.solve(self.block, self._weights(group), self._enough(statistics))
        except Unsolvable as error:
            raise DscError(f"{prefix}{group[0].name}: {error.what}", error.fix) from None
        for linear, solved in zip(group, found, strict=True):
            name = f"{prefix}{linear.name}.weight"
            parts = parts_of(name, solved.stored, self.job.scheme is not None)
            self.store(name, {suffix: part.cpu() for suffix, part in parts.items()})
            loaded = solved.stored.dequantize() if isinstance(solved.stored, Quantized) else solved.stored.float()
            self.tensors[linear.name + ".weight"] = loaded
            self.facts.append({"name": prefix + linear.name, "role": str(linear.role), **solved.facts})


def rounded_rows(rows: Rows, how: Rtn, places: Tensor) -> Tensor:
    """Rows of a table rounded to nearest."""
    found = rows(places)
    return how(found, Statistics()).dequantize().to(found.device) if len(found) else found


def input_facts(linear: Linear, statistics: Statistics) -> dict[str, Any]:
    """Describe a linear's input: tokens, largest and mean magnitude, and how far the largest channel stands out."""
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

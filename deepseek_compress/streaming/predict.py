"""Predictions of models over a text, position by position, when none of them need fit into memory.

All models advance together over the same tokens, block by block, expert by expert; what enters their heads lies in
stores, and `head` makes logits of it piece by piece. A teacher's words for a student come from the same place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from deepseek_compress.models.moe import Routing
from deepseek_compress.models.two_level import shared
from deepseek_compress.numerics.channel_error import ChannelError
from deepseek_compress.numerics.expert_choice import Choices, ExpertChoice
from deepseek_compress.streaming.batches import Batches
from deepseek_compress.streaming.block_run import PlainRun
from deepseek_compress.streaming.forward import run_block
from deepseek_compress.streaming.head import HeadInput, Rows
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.streaming.loop import Facts, Loop, Progress, Stream, Visit
from deepseek_compress.workers import Pool

Task = TypeVar("Task")
Result = TypeVar("Result")
Runs = Sequence[PlainRun]


@contextmanager
def predictions(
    runs: Runs,
    tokens: Tensor,
    places: list[int],
    work: Path,
    pool: Pool,
    progress: Progress,
    compared: Tensor | None = None,
) -> Iterator[tuple[list[HeadInput], list[Facts]]]:
    """Run models of one depth over tokens int64 (samples, length), padded at the right: inputs of their heads, facts.

    The former have the rows at `places`, which count through the samples.
    `pool` shares `runs`. Facts of a block, a list with an entry for each model: "errors" (||h - h'|| / ||h||, h of the
    first), "outliers" (`ChannelError`), "choices" (share of the first model's chosen entries), "experts"
    (`ExpertChoice`), over the rows where `compared`, bool (samples, length), is true; null for a model of another width
    and where a block has none of it. An interrupted run goes on from `work`.
    """
    streams = tuple(Stream(run.architecture, f"states-{number}") for number, run in enumerate(runs))
    loop = Loop(streams, tokens, work, "predict", last=True)
    facts = loop.run(_Together(runs, pool, compared), progress)
    with ExitStack() as stack, torch.no_grad():
        found = []
        for run, stream in zip(runs, streams, strict=True):
            states = stack.enter_context(loop.output(stream))
            path = work / f"{stream.name}-final.tmp"
            final = stack.enter_context(HiddenStore(path, states.rows, (run.architecture.cfg.hidden_size,)))
            _finish(run, states, final, Batches(tokens, device=run.architecture.device))
            weight = run.architecture.table(run.architecture.head, run.architecture.device)
            found.append(HeadInput(_rows(final, places), weight))
        yield found, facts


def _rows(final: HiddenStore, places: list[int]) -> Rows:
    return lambda start, count: final.gather(places[start : start + count])


def _finish(run: PlainRun, states: HiddenStore, final: HiddenStore, batches: Batches) -> None:
    """Fill `final` with what enters the head."""
    architecture, top = run.architecture, run.architecture.top()
    for batch in range(len(batches)):
        batches.write(final, batch, architecture.final_hidden(top, batches.read(states, batch)))


@dataclass(frozen=True)
class _Together:
    """Runs each block of every model as it is."""

    runs: Runs
    pool: Pool
    compared: Tensor | None

    @torch.no_grad()
    def visit(self, at: Visit) -> Facts:
        """{"errors": [...], "outliers": [...], "choices": [...], "experts": [...]}."""
        routed: dict[int, Routing] = {}
        for number in range(len(self.runs)):
            advance(self.runs, number, at, self.pool, partial(routed.setdefault, number))
        found = self._errors(at)
        return {
            "errors": [error and error.relative() for error in found],
            "outliers": [error and error.outliers() for error in found],
            "choices": self._choices(at),
            "experts": self._experts(at, routed),
        }

    def _experts(self, at: Visit, routed: Mapping[int, Routing]) -> list[Choices | None]:
        """Compare each model's choice of experts with the first's; None where they have none, or other ones."""
        counts = [run.architecture.blocks[at.layer].moe for run in self.runs]
        found: list[Choices | None] = [None] * len(self.runs)
        if self.compared is None or 0 not in routed:
            return found
        rows = self.compared.flatten()
        for number, routing in routed.items():
            first, its = counts[0], counts[number]
            if first is not None and its is not None and first.experts == its.experts:
                choice = ExpertChoice(its.experts)
                choice.add(routed[0].experts[rows], routing.experts[rows])
                found[number] = choice.result()
        return found

    def _errors(self, at: Visit) -> list[ChannelError | None]:
        found: list[ChannelError | None] = [None] * len(self.runs)
        if self.compared is None:
            return found
        first = at.after[0]
        alike = [number for number, other in enumerate(at.after) if other.row_shape == first.row_shape]
        errors = {number: ChannelError(self.runs[0].architecture.cfg.hidden_size) for number in alike}
        for batch in range(len(at.batches)):
            rows = self.compared[batch * at.batches.step : (batch + 1) * at.batches.step].to(at.batches.device)
            expected = self._residual(0, at.batches.read(first, batch))[rows]
            for number, error in errors.items():
                given = (
                    expected if not number else self._residual(number, at.batches.read(at.after[number], batch))[rows]
                )
                error.add(expected, given)
        return [errors.get(number) for number in range(len(self.runs))]

    def _choices(self, at: Visit) -> list[float | None]:
        """Of the entries that the first model's queries see, the share that each model's see too."""
        architectures = [run.architecture for run in self.runs]
        found: list[float | None] = [None] * len(self.runs)
        first = architectures[0]
        if self.compared is None or not first.family.chooses(first.cfg, at.layer):
            return found  # without reading the streams again
        if any(a.row_shape != first.row_shape for a in architectures):
            return found
        counts = [(0, 0)] * len(self.runs)
        for batch in range(len(at.batches)):
            rows = self.compared[batch * at.batches.step : (batch + 1) * at.batches.step].to(at.batches.device)
            each = [a.family.choice(a.cfg, at.layer, at.batches.read(store, batch))
                    for a, store in zip(architectures, at.after, strict=True)]  # fmt: skip
            for number, choice in enumerate(each):
                if choice is not None and each[0] is not None:
                    more = shared(each[0][rows], choice[rows])
                    counts[number] = (counts[number][0] + more[0], counts[number][1] + more[1])
        return [same / total if total else None for same, total in counts]

    def _residual(self, number: int, hidden: Tensor) -> Tensor:
        architecture = self.runs[number].architecture
        return architecture.family.residual(architecture.cfg, hidden)


def advance(
    runs: Runs, number: int, at: Visit, pool: Pool, routed: Callable[[Routing], object] = lambda routing: None
) -> None:
    """Run a block of one of `runs`, which `pool` shares, as it is: the stream of that number."""
    mine = _One(pool, number)
    run_block(
        runs[number], at.layer, at.before[number], at.batches, at.after[number], lambda name, parts: None, mine, routed
    )


@dataclass(frozen=True)
class _One:
    """A pool that shares several runs, as that of one of them."""

    pool: Pool
    number: int

    @property
    def count(self) -> int:
        return self.pool.count

    @property
    def here(self) -> bool:
        return self.pool.here

    def run(self, function: Callable[[Any, Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        return self.pool.run(_with, [(self.number, function, task) for task in tasks])


def _with(runs: Runs, what: tuple[int, Callable[[Any, Task], Result], Task]) -> Result:
    """Run a task in a worker."""
    number, function, task = what
    return function(runs[number], task)

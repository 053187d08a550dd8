"""Run text through a model as it is, to look at the inputs of its linears before anything changes.

Each weight is read when it is used. Everything is computed in this process and in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from deepseek_compress.models import Architecture, Block, Role
from deepseek_compress.models.attend import SCORES_AT_ONCE
from deepseek_compress.models.weights import HookedWeights
from deepseek_compress.planning.costs import Work
from deepseek_compress.streaming.batches import BATCH_TOKENS
from deepseek_compress.streaming.hidden_store import RESIDENT
from deepseek_compress.streaming.loop import Facts, Loop, Progress, Stream, Visit

Look = Callable[[str, Tensor], None]  # (name of a linear in its block, its input)


class Adds(Protocol):
    """Sums what it is given."""

    def add(self, x: Tensor) -> object:
        """Take up x (..., columns)."""


def feeding(watched: Mapping[str, Adds]) -> Look:
    """Add the input of each linear that is `watched` to its sums."""

    def look(name: str, x: Tensor) -> None:
        if name in watched:
            watched[name].add(x)

    return look


class Collector:
    """Looks at the inputs of a block's linears, then says what it found."""

    def begin(self, block: Block) -> Look:
        """Return what is called for the input of each linear."""
        raise NotImplementedError

    def end(self, block: Block) -> Facts:
        """Return what was found, as JSON can hold it."""
        raise NotImplementedError


class Cost(NamedTuple):
    """Of the run over the text."""

    memory: int  # bytes
    work: Work


NOTHING = Cost(0, Work())


def cost(architecture: Architecture, samples: int, length: int) -> Cost:
    """Return the largest weight decoded, a batch in a block, and the hidden state; two operations a weight and
    token."""
    cfg, tokens = architecture.cfg, samples * length
    share = 1.0 if cfg.moe is None else cfg.moe.top_k / cfg.moe.experts
    sizes = [linear for block in architecture.blocks for linear in block.linears]
    active = sum(x.rows * x.columns * (share if x.role is Role.EXPERT else 1.0) for x in sizes)
    embedding = architecture.header.tensors[architecture.embedding].elements // 2
    largest = max([x.rows * x.columns for x in sizes] + [embedding])
    rows = max(x.rows for x in sizes) + 8 * cfg.hidden_size
    states = 8 * min(RESIDENT, 4 * tokens * cfg.hidden_size) + 12 * SCORES_AT_ONCE
    return Cost(8 * largest + 4 * BATCH_TOKENS * _together(architecture) * rows + states, Work(2.0 * active * tokens))


def collect_inputs(
    architecture: Architecture, tokens: Tensor, work: Path, name: str, collector: Collector, progress: Progress
) -> list[Facts]:
    """Let `collector` look at every block over tokens int64 (samples, length); returns what it found of each.

    name: of its files in `work`, from which an interrupted run goes on.
    """
    loop = Loop((Stream(architecture, f"{name}-input"),), tokens, work, name, f"{name} of block",
                together=_together(architecture))  # fmt: skip
    return loop.run(_Looked(collector), progress)


class _Looked:
    """Runs each block on weights that are read at each use."""

    def __init__(self, collector: Collector) -> None:
        self.collector = collector

    @torch.no_grad()
    def visit(self, at: Visit) -> Facts:
        block = at.blocks[0]
        weights = HookedWeights(block.weights(), self.collector.begin(block))
        for batch in range(len(at.batches)):
            out = block.run(weights, at.batches.read(at.before[0], batch), at.batches.ids(batch))
            if at.after:
                at.batches.write(at.after[0], batch, out)
        return self.collector.end(block)


def _together(architecture: Architecture) -> int:
    """Batches that run as one: each time, all experts of a block are read."""
    return 1 if architecture.cfg.moe is None else 4

"""Statistics of every linear's input in the model as it is: a job that changes nothing, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from deepseek_compress.compress.forecast import HESSIANS, TEXT, calibrated_cost
from deepseek_compress.compress.job import Job, Solved, by_input
from deepseek_compress.models import Architecture, Block, Linear, ModelConfig, Role
from deepseek_compress.numerics.types import Statistics
from deepseek_compress.planning.costs import Memory, Work, total


@dataclass(frozen=True)
class CollectOnly:
    """A solver that changes nothing: every linear is looked at, `needs` says what is collected."""

    needs: frozenset[str]
    min_tokens: int = 0

    def wants(self, block: Block, linear: Linear) -> bool:
        """All of them."""
        return True

    def solve(self, block: Block, group: Sequence[tuple[Linear, Tensor]], statistics: Statistics) -> list[Solved]:
        """Never called: the job stores the statistics."""
        raise NotImplementedError


def collecting(architecture: Architecture, fields: Sequence[str], work: Path) -> Job:
    """Return the job that collects `fields` of `Statistics`."""
    return Job(architecture, CollectOnly(frozenset(fields)), work, collecting=True)


def expected(
    architecture: Architecture, fields: Sequence[str], samples: int, length: int
) -> tuple[int, Memory, Work, Work]:
    """Bytes on disk, memory, work here and in workers, for `samples` of `length` tokens."""
    cfg = architecture.cfg
    blocks = [collected(cfg, block, fields, samples, length) for block in architecture.blocks]
    alone = max([2 * cfg.vocab_size * cfg.hidden_size, *(block.alone for block in blocks)])
    resident, task = max(block.resident for block in blocks), max(block.task for block in blocks)
    works, tasks = total(block.work for block in blocks), total(block.tasks for block in blocks)
    return sum(block.size for block in blocks), Memory(TEXT + alone, TEXT + resident, task), works, tasks


class Collected(NamedTuple):
    """Of one block: bytes on disk, bytes as in `Memory`, and work."""

    size: int
    alone: int
    resident: int
    task: int
    work: Work
    tasks: Work


def collected(cfg: ModelConfig, block: Block, fields: Sequence[str], samples: int, length: int) -> Collected:
    """Return what the statistics of a block take."""
    cost, tokens, size = calibrated_cost(cfg, block.linears, [], samples, length, False), samples * length, 0
    works, tasks = [cost.work], [cost.tasks]
    largest = {True: 0, False: 0}  # experts or not: bytes of the largest Hessians at once
    for group in by_input(block.linears):
        n, expert = group[0].columns, group[0].role is Role.EXPERT
        size += 8 + 8 * n
        if "hessian" not in fields:
            continue
        size += 2 * n * (n + 1)
        largest[expert] = max(largest[expert], 4 * HESSIANS * n * n)
        share = tokens * cfg.moe.top_k / cfg.moe.experts if expert and cfg.moe else tokens
        (tasks if expert else works).append(Work(1.1 * share * n * n))
    alone, task = max(cost.alone, largest[False]), max(cost.task, largest[True])
    return Collected(size, alone, cost.resident, task, total(works), total(tasks))

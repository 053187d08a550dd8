"""Statistics of every linear's input in the model as it is: a job that changes nothing, and what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_compress.blocks.candidates import Unchanged
from deepseek_compress.blocks.forecast import HESSIANS, TEXT, calibrated_cost
from deepseek_compress.blocks.job import Job, by_input
from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.costs import Memory, Work, total
from deepseek_compress.models import Family, Linear, ModelConfig, Role


@dataclass(frozen=True)
class Observed(Unchanged):
    """Every linear is looked at; `needs` says what is collected."""

    needs: frozenset[str]

    def wants(self, layer: int, linear: Linear) -> bool:
        """All of them."""
        return True


def observing(source: Checkpoint, family: Family, cfg: ModelConfig, fields: Sequence[str], work: Path) -> Job:
    """The job that collects `fields` of `Statistics`."""
    return Job(source, family, cfg, Observed(frozenset(fields)), work, observing=True)


def expected(
    family: Family, cfg: ModelConfig, fields: Sequence[str], samples: int, length: int
) -> tuple[int, Memory, Work, Work]:
    """Bytes on disk, memory, work here and in workers, for `samples` of `length` tokens."""
    size, alone, beside, task, tokens = 0, 2 * cfg.vocab_size * cfg.hidden_size, 0, 0, samples * length
    works, tasks = [Work()], [Work()]
    for layer in range(cfg.num_hidden_layers):
        linears = family.linears(cfg, layer)
        block = calibrated_cost(cfg, linears, [], samples, length, False)
        works.append(block.work)
        tasks.append(block.tasks)
        alone, beside, task = max(alone, block.alone), max(beside, block.beside), max(task, block.task)
        held = {True: 0, False: 0}  # experts or not: bytes of the largest Hessians at once
        for group in by_input(linears):
            n, expert = group[0].columns, group[0].role is Role.EXPERT
            size += 8 + 8 * n
            if "hessian" not in fields:
                continue
            size += 2 * n * (n + 1)
            held[expert] = max(held[expert], 4 * HESSIANS * n * n)
            share = tokens * cfg.moe.top_k / cfg.moe.experts if expert and cfg.moe else tokens
            (tasks if expert else works).append(Work(1.1 * share * n * n))
        alone, task = max(alone, held[False]), max(task, held[True])
    return size, Memory(TEXT + alone, TEXT + beside, task), total(works), total(tasks)

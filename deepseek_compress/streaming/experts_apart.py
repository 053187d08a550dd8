"""The routed experts of a block on several GPUs: each task is some of them, solved side by side as in `experts_here`.

The stored input and what each expert gives go through files, as they do between processes of the CPU. What is added to
a token is summed on the first GPU, expert by expert, so that neither their number nor who was first changes a bit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_compress.models.moe import Routing, by_expert
from deepseek_compress.planning.device import release
from deepseek_compress.streaming.block_run import BlockRun, Run
from deepseek_compress.streaming.experts import ROWS, Sent, coverage, output_of, received, sent
from deepseek_compress.streaming.experts_here import Expert, together, visit
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.workers import Pool


class _Task(NamedTuple):
    layer: int
    numbers: range  # the experts
    places: list[Sent]  # of each: `by_expert`
    length: int  # tokens in a sample
    input: Path  # store (rows, hidden) of the block's input
    rows: int
    more: bool  # what they give is wanted, in the files `output_of`


class _Done(NamedTuple):
    stored: list[tuple[str, dict[str, Sent]]]
    facts: list[dict[str, Any]]
    counts: list[int]


def run_apart(
    run: Run, block: BlockRun, routing: Routing, x: HiddenStore, added: HiddenStore | None, length: int, pool: Pool
) -> dict[str, Any]:
    """`experts_here.run_here` shared out to the GPUs of `pool`: the same bytes as on one."""
    moe, more = block.block.moe, added is not None
    assert moe is not None
    places, gate_weights = by_expert(routing, moe.experts), routing.gate_weights.flatten().to(run.architecture.device)
    step = min(together(run, block), -(-moe.experts // pool.count))
    groups = [range(start, min(start + step, moe.experts)) for start in range(0, moe.experts, step)]
    tasks = [
        _Task(block.block.layer, group, [sent(places[n]) for n in group], length, x.path, x.rows, more)
        for group in groups
    ]
    release(run.architecture.device)  # a worker computes there too
    counts: list[int] = []
    for task, done in zip(tasks, pool.run(_group, tasks), strict=True):
        for name, parts in done.stored:
            block.store(name, {suffix: received(part) for suffix, part in parts.items()})
        block.facts += done.facts
        counts += done.counts
        for number in task.numbers if added is not None else ():
            _add(Expert(run, block, number, places[number], length), gate_weights, added)
    return coverage(run, counts)


def _add(expert: Expert, gate_weights: Tensor, added: HiddenStore | None) -> None:
    """Add what an expert gave, as `experts_here` does."""
    count = len(expert.tokens)
    if added is None or not count:
        return
    path = output_of(expert.run, expert.number)
    with HiddenStore(path, count, added.row_shape, existing=True, resident=0) as given:
        for batch, start in enumerate(range(0, count, ROWS)):
            expert.add(batch, given.read(start, min(ROWS, count - start)).to(expert.device), gate_weights, added)
        given.remove()


def _group(run: Run, task: _Task) -> _Done:
    """Run a group of experts in a worker."""
    block = run.begin(task.layer, lambda name, parts: None)  # each of the experts has a store of its own
    width = (block.block.cfg.hidden_size,)
    experts = [
        Expert(run, block, number, received(places), task.length)
        for number, places in zip(task.numbers, task.places, strict=True)
    ]
    outputs: dict[int, HiddenStore] = {}

    def keep(number: int, batch: int, given: Tensor) -> None:
        expert = experts[number]
        if number not in outputs:
            outputs[number] = HiddenStore(output_of(run, expert.number), len(expert.tokens), width, resident=0)
        outputs[number].write(batch * ROWS, given)

    with HiddenStore(task.input, task.rows, width, existing=True, resident=0) as x, torch.no_grad():
        visit(experts, x, keep if task.more else None)
    for store in outputs.values():
        store.close()
    stored = [
        (name, {suffix: sent(part) for suffix, part in parts.items()})
        for expert in experts
        for name, parts in expert.stored
    ]
    facts = [fact for expert in experts for fact in expert.own.facts]
    return _Done(stored, facts, [expert.count for expert in experts])

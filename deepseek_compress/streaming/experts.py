"""The routed experts of a block: each is a task, run with its own tokens wherever there is room for it.

A task reads the expert's weights from the checkpoint and its tokens from the store of the block's input, runs or solves
it, and gives back new weights as they are stored. What the expert then adds to its tokens goes through a file and is
summed here, expert by expert, so that the sum does not depend on who was first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepseek_compress.models.config import Linear
from deepseek_compress.models.moe import Routing, by_expert, run_expert
from deepseek_compress.streaming.block_run import BlockRun, Part, Run, Watch
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.streaming.paired_forward import Split, alongside, pairs_first
from deepseek_compress.workers import Pool

ROWS = 2048  # tokens that are multiplied at a time; fixed, since sums in another order have other bits


class _Task(NamedTuple):
    layer: int
    expert: int
    input: Path  # store (rows, hidden) of the block's input
    rows: int
    tokens: np.ndarray[Any, np.dtype[np.int64]]  # rows of it that the expert is given
    pairs: int | None  # in a paired run: how many stand at the start, see `alongside`
    output: Path | None  # store (tokens, hidden) to be made of what the expert gives


class _Done(NamedTuple):
    stored: list[tuple[str, dict[str, Sent]]]
    facts: list[dict[str, Any]]


class Sent(NamedTuple):
    """A tensor between processes: numpy has no BF16."""

    bytes: np.ndarray[Any, np.dtype[np.uint8]]
    dtype: torch.dtype
    shape: tuple[int, ...]


def run_experts(
    run: Run, block: BlockRun, routing: Routing, x: HiddenStore, added: HiddenStore | None, length: int, pool: Pool
) -> dict[str, Any]:
    """Run every expert with the tokens routed to it; add their outputs to `added`. Returns the coverage.

    `length`: tokens in a sample, which is how a paired run tells the original model's rows.
    """
    moe = block.block.moe
    assert moe is not None
    places = by_expert(routing, moe.experts)
    tasks = [_task(run, block, expert, places[expert], x, length, added is not None) for expert in range(moe.experts)]
    gate_weights, counts = routing.gate_weights.flatten(), []
    for task, done in zip(tasks, pool.run(_expert, tasks), strict=True):
        for name, parts in done.stored:
            block.store(name, {suffix: received(part) for suffix, part in parts.items()})
        block.facts += done.facts
        if added is not None and task.output is not None:
            _add(task, places[task.expert], gate_weights, moe.top_k, added)
        counts.append(len(task.tokens) if task.pairs is None else task.pairs)
    return coverage(run, counts)


def output_of(run: Run, expert: int) -> Path:
    """Where a worker leaves what an expert gives."""
    return run.work / f"expert-{expert:05d}.tmp"


def coverage(run: Run, counts: list[int]) -> dict[str, Any]:
    """Summarize how many tokens reach the experts."""
    starved = [expert for expert, count in enumerate(counts) if count < run.min_tokens]
    return {"tokens": counts, "starved": starved}


def _task(run: Run, block: BlockRun, expert: int, chosen: Tensor, x: HiddenStore, length: int, more: bool) -> _Task:
    moe = block.block.moe
    assert moe is not None
    tokens = chosen // moe.top_k
    tokens, pairs = alongside(tokens, length) if run.paired else (tokens, None)
    output = output_of(run, expert) if more and len(tokens) else None
    return _Task(block.block.layer, expert, x.path, x.rows, tokens.numpy(), pairs, output)


def _add(task: _Task, chosen: Tensor, gate_weights: Tensor, top_k: int, added: HiddenStore) -> None:
    """Add what the expert gave, times its gate weights, to the rows of `added` that are routed to it, `chosen`."""
    assert task.output is not None
    place = torch.full((task.rows,), -1)
    place[chosen // top_k] = chosen
    places = place[torch.from_numpy(task.tokens)]
    with HiddenStore(task.output, len(places), added.row_shape, existing=True, resident=0) as given:
        for start in range(0, len(places), ROWS):
            some = places[start : start + ROWS]
            routed = some[some >= 0]
            added.add((routed // top_k).tolist(), given.read(start, len(some))[some >= 0] * gate_weights[routed, None])
        given.remove()


def _expert(run: Run, task: _Task) -> _Done:
    """Run one expert in a worker."""
    stored: list[tuple[str, dict[str, Sent]]] = []
    block = run.begin(
        task.layer, lambda name, parts: stored.append((name, {key: sent(part) for key, part in parts.items()}))
    )
    linears = [linear for linear in block.block.linears if linear.expert == task.expert]
    if not block.acts(linears) and task.output is None:
        return _Done([], [])
    width = block.block.cfg.hidden_size
    with HiddenStore(task.input, task.rows, (width,), existing=True, resident=0) as x:
        if task.output is None:
            block.act(_part(run, block, task, linears, x))
        else:
            with HiddenStore(task.output, len(task.tokens), (width,), resident=0) as given:
                for batch, y, _ in block.outputs(_part(run, block, task, linears, x)):
                    _put(given, batch, y)
    return _Done(stored, block.facts)


def _put(store: HiddenStore, batch: int, rows: Tensor) -> None:
    store.write(batch * ROWS, rows.cpu())


def _part(run: Run, block: BlockRun, task: _Task, linears: Sequence[Linear], x: HiddenStore) -> Part:
    moe, tokens, device = block.block.moe, task.tokens, block.block.architecture.device
    assert moe is not None

    def split(batch: int) -> Split | None:
        rows = range(batch * ROWS, min((batch + 1) * ROWS, len(tokens)))
        return None if task.pairs is None else pairs_first(rows, task.pairs, device)

    def forward(watch: Watch, batch: int) -> Tensor:
        some = x.gather(tokens[batch * ROWS : (batch + 1) * ROWS].tolist()).to(device)
        return run_expert(moe, block.weights(watch, split(batch)), task.expert, some)

    kept = run.work / f"expert-{task.expert:05d}.kept"

    def get(store: HiddenStore, batch: int) -> Tensor:
        return store.read(batch * ROWS, min(ROWS, store.rows - batch * ROWS)).to(device)

    return Part(linears, forward, -(-len(tokens) // ROWS), len(tokens), kept, _put, get, split, linears[-1].name)


def sent(tensor: Tensor) -> Sent:
    """Prepare a CPU tensor for another process."""
    return Sent(tensor.contiguous().reshape(-1).view(torch.uint8).numpy(), tensor.dtype, tuple(tensor.shape))


def received(sent: Sent) -> Tensor:
    """Restore a tensor that another process sent."""
    flat = sent.bytes if sent.bytes.flags.writeable else sent.bytes.copy()  # what Ray hands out is read-only
    return torch.from_numpy(flat).view(sent.dtype).view(sent.shape)

"""One block in parts: attention, then the MLP or the experts; each part's weights are in memory only while it runs.

The hidden state of all samples lies in stores; a batch of it is in memory. Each expert is read once and meets all of
its tokens. Experts are tasks of the pool; everything else is computed here. A run that solves sees each linear with the
inputs that the changed ones before it give.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deepseek_compress import machine
from deepseek_compress.models.config import Linear, Moe, Role
from deepseek_compress.models.layers import swiglu
from deepseek_compress.models.moe import Routing, route, run_shared
from deepseek_compress.models.rope import places
from deepseek_compress.streaming.batches import Batches
from deepseek_compress.streaming.block_run import BlockRun, Forward, Part, Run, Store, Watch
from deepseek_compress.streaming.experts import run_experts
from deepseek_compress.streaming.experts_apart import run_apart
from deepseek_compress.streaming.experts_here import run_here
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.workers import Pool

Routed = Callable[[Routing], object]


def run_block(
    run: Run,
    layer: int,
    hidden: HiddenStore,
    batches: Batches,
    following: HiddenStore | None,
    store: Store,
    pool: Pool,
    routed: Routed = lambda routing: None,
) -> dict[str, Any]:
    """Run block `layer` over `hidden`; with `following`, keep what it gives there. New weights go to `store`.

    `routed` is given where the block's tokens go. Returns {"linears": [facts], "experts": {"tokens": [per expert],
    "starved": [...]}}, the latter where there are any.
    """
    block = run.begin(layer, store)
    block.load_others()
    rows, work, device = hidden.rows, run.work, run.architecture.device
    with HiddenStore(work / "attended.tmp", rows, hidden.row_shape, device=device) as attended:
        _attention(run, block, hidden, attended, batches)
        machine.return_freed_memory()  # the experts' workers need it
        resident = None if device.type != "cpu" and pool.here else 0  # workers read it
        with HiddenStore(
            work / "input.tmp", rows, (block.block.cfg.hidden_size,), resident=resident, device=device
        ) as x:
            facts = _ffn(run, block, attended, x, batches, following, pool, routed)
            x.remove()
        attended.remove()
    return {"linears": block.facts, **facts}


def _attention(run: Run, block: BlockRun, hidden: HiddenStore, attended: HiddenStore, batches: Batches) -> None:
    here = block.block
    linears = [linear for linear in here.linears if linear.role in (Role.ATTENTION, Role.INDEXER, Role.ENGRAM)]

    def forward(watch: Watch, batch: int) -> Tensor:
        x, weights = batches.read(hidden, batch), block.weights(watch, batches.split(batch))
        positions = places(len(x), 0, batches.length, x.device)
        return here.attention_part(weights, x, positions, block.cache())

    part = _part(run, linears, forward, batches)
    if hidden.row_shape == (here.cfg.hidden_size,):  # one stream, to which attention adds what its last linear gives
        part = replace(part, last=here.cfg.names.o, stream=lambda batch: batches.read(hidden, batch))
    for batch, output, partial in block.outputs(part):
        batches.write(attended, batch, batches.read(hidden, batch) + output if partial else output)


def _part(run: Run, linears: list[Linear], forward: Forward, batches: Batches) -> Part:
    """Build a part over the batches of all samples."""
    rows = batches.samples * batches.length
    path = run.work / "last.tmp"
    return Part(linears, forward, len(batches), rows, path, batches.write, batches.read, batches.split)


def _ffn(
    run: Run,
    block: BlockRun,
    attended: HiddenStore,
    x: HiddenStore,
    batches: Batches,
    following: HiddenStore | None,
    pool: Pool,
    routed: Routed,
) -> dict[str, Any]:
    """Run the MLP, or shared and routed experts; fill `x` with their input and `following` with the block's output."""
    here = block.block
    for batch in range(len(batches)):
        batches.write(x, batch, here.ffn_input(block.weights(), batches.read(attended, batch)))
    facts: dict[str, Any] = {}
    with HiddenStore(run.work / "added.tmp", x.rows, x.row_shape, device=run.architecture.device) as added:
        sums = added if following else None
        if here.moe is not None:
            routing = _route(block, here.moe, x, batches)
            routed(routing)
            if run.architecture.device.type == "cpu":
                facts["experts"] = run_experts(run, block, routing, x, sums, batches.length, pool)
            elif pool.here:
                facts["experts"] = run_here(run, block, routing, x, sums, batches.length)
            else:
                facts["experts"] = run_apart(run, block, routing, x, sums, batches.length, pool)
            if here.moe.shared:
                _dense(run, block, here.moe.names.shared, attended, x, sums, batches)
        else:
            _dense(run, block, here.cfg.names.ffn.mlp, attended, x, sums, batches)
        if following is not None:
            for batch in range(len(batches)):
                before, more = batches.read(attended, batch), batches.read(added, batch)
                batches.write(following, batch, here.ffn_output(block.weights(), before, more))
        added.remove()
    return facts


def _dense(
    run: Run,
    block: BlockRun,
    name: str,
    attended: HiddenStore,
    x: HiddenStore,
    added: HiddenStore | None,
    batches: Batches,
) -> None:
    """Run the MLP `name` and add what it gives to `added`; with that, it is added to `attended`."""
    moe, names = block.block.cfg.moe, block.block.cfg.names.ffn
    linears = [linear for linear in block.block.linears if linear.name.rsplit(".", 1)[0] == name]

    def forward(watch: Watch, batch: int) -> Tensor:
        source, weights = batches.read(x, batch), block.weights(watch, batches.split(batch))
        if moe is not None and name == moe.names.shared:
            return run_shared(moe, weights, source)
        return swiglu(weights, name, source, names=names)

    def stream(batch: int) -> Tensor:
        before = batches.read(attended, batch)
        return before if added is None else before + batches.read(added, batch)

    part = _part(run, linears, forward, batches)
    if attended.row_shape == x.row_shape and (added is not None or moe is None):
        part = replace(part, last=f"{name}.{names.down}", stream=stream)
    if added is None:
        block.act(part)
        return
    for batch, output, _ in block.outputs(part):
        batches.write(added, batch, batches.read(added, batch) + output)


def _route(block: BlockRun, moe: Moe, x: HiddenStore, batches: Batches) -> Routing:
    parts = [
        route(moe, block.weights(), batches.read(x, batch).flatten(0, 1), batches.ids(batch).flatten())
        for batch in range(len(batches))
    ]
    experts, gate_weights = (torch.cat(values).cpu() for values in zip(*parts, strict=True))  # for tasks
    return Routing(experts, gate_weights)

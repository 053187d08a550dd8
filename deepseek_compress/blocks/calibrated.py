"""One block with calibration: attention, then the MLP or the experts, each linear seeing what the changed ones give.

The hidden state of all samples lies on disk; a batch of it is in memory. Experts are tasks of the pool; everything else
is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deepseek_compress import machine
from deepseek_compress.blocks.experts import run_experts
from deepseek_compress.blocks.job import Block, Job, Store
from deepseek_compress.blocks.pairs import Split, pairs
from deepseek_compress.blocks.spool import Spool
from deepseek_compress.blocks.statistics import Part, Watch
from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.models import Family
from deepseek_compress.models.config import ModelConfig, Moe, Role
from deepseek_compress.models.layers import swiglu
from deepseek_compress.models.moe import Routing, route, run_shared
from deepseek_compress.workers import Pool

Routed = Callable[[Routing], None]
BATCH_TOKENS = 2048  # fixed: another batch size has other roundings


class Batches:
    """How the rows of a spool (samples * length) are taken: whole samples, about BATCH_TOKENS tokens at a time.

    `paired`: every sample stands there twice, and the two are never parted.
    """

    def __init__(self, tokens: Tensor, paired: bool = False) -> None:
        self.tokens = tokens  # (samples, length)
        self.paired = paired
        self.samples, self.length = tokens.shape
        self.step = max(1, BATCH_TOKENS // self.length)
        if paired:
            self.step += self.step % 2

    def __len__(self) -> int:
        return -(-self.samples // self.step)

    def read(self, spool: Spool, batch: int) -> Tensor:
        """(n, length, *row_shape)."""
        count = len(self.ids(batch))
        rows = spool.read(batch * self.step * self.length, count * self.length)
        return rows.view(count, self.length, *spool.row_shape)

    def write(self, spool: Spool, batch: int, values: Tensor) -> None:
        """Store (n, length, *row_shape)."""
        spool.write(batch * self.step * self.length, values.reshape(-1, *spool.row_shape))

    def ids(self, batch: int) -> Tensor:
        """Token ids (n, length)."""
        return self.tokens[batch * self.step : (batch + 1) * self.step]

    def split(self, batch: int) -> Split | None:
        """Which samples of the batch are the original model's."""
        return pairs(len(self.ids(batch))) if self.paired else None

    def positions(self, batch: int) -> Tensor:
        """(n, length): every sample starts at 0."""
        return torch.arange(self.length).expand(len(self.ids(batch)), -1)


def embedded(job: Job, tokens: Tensor) -> Spool:
    """The input of the first block for tokens (samples, length)."""
    spool = Spool(job.work / "embedded.tmp", tokens.numel(), row_shape(job.family, job.cfg))
    embed_into(spool, job.source, job.family, job.cfg, tokens)
    return spool


def embed_into(spool: Spool, source: Checkpoint, family: Family, cfg: ModelConfig, tokens: Tensor) -> None:
    """Write the input of the first block for tokens (samples, length)."""
    table = source.read(family.embedding, dtype=None)  # as stored: float32 would take twice the memory
    batches = Batches(tokens)
    for batch in range(len(batches)):
        batches.write(spool, batch, family.embed(cfg, table, batches.ids(batch)).float())


def row_shape(family: Family, cfg: ModelConfig) -> tuple[int, ...]:
    """Of the hidden state of one token."""
    probe = family.embed(cfg, torch.empty(1, cfg.hidden_size), torch.zeros(1, 1, dtype=torch.long))
    return tuple(probe.shape[2:])


def calibrated_block(
    job: Job,
    layer: int,
    hidden: Spool,
    batches: Batches,
    following: Spool | None,
    store: Store,
    pool: Pool,
    routed: Routed = lambda routing: None,
) -> dict[str, Any]:
    """Change block `layer`: new weights go to `store`; with `following`, keep what the block then gives there.

    `routed` is told where the block's tokens go.

    Returns {"linears": [facts], "experts": {"tokens": [per expert], "starved": [...]}}, the latter where there are any.
    """
    block = Block(job, layer, store)
    linears = {linear.name + suffix for linear in block.linears for suffix in (".weight", ".bias")}
    for name in block.names:
        if name not in linears:
            block.read(name)
    rows = hidden.rows
    with Spool(job.work / "attended.tmp", rows, hidden.row_shape) as attended:
        _attention(block, hidden, attended, batches)
        machine.return_freed_memory()  # the experts' workers need it
        with Spool(job.work / "input.tmp", rows, (job.cfg.hidden_size,), held=0) as x:
            facts = _ffn(block, attended, x, batches, following, pool, routed)
            x.remove()
        attended.remove()
    return {"linears": block.facts, **facts}


def _attention(block: Block, hidden: Spool, attended: Spool, batches: Batches) -> None:
    job = block.job
    linears = [linear for linear in block.linears if linear.role in (Role.ATTENTION, Role.INDEXER)]

    def forward(watch: Watch, batch: int) -> Tensor:
        x, weights = batches.read(hidden, batch), block.weights(watch, batches.split(batch))
        return job.family.attention_part(job.cfg, block.layer, weights, x, batches.positions(batch))

    plain = hidden.row_shape == (job.cfg.hidden_size,)  # one stream, to which attention adds what its last linear gives
    part = Part(linears, forward, len(batches), batches.split)
    if plain:
        part = replace(part, last="self_attn.o_proj", stream=lambda batch: batches.read(hidden, batch))
    for batch, output, partial in _solved(block, part, batches):
        batches.write(attended, batch, batches.read(hidden, batch) + output if partial else output)


def _solved(block: Block, part: Part, batches: Batches) -> Iterator[tuple[int, Tensor, bool]]:
    """`Block.solved` over the batches of all samples."""
    rows = batches.samples * batches.length
    return block.solved(part, block.job.work / "last.tmp", rows, batches.write, batches.read)


def _ffn(
    block: Block, attended: Spool, x: Spool, batches: Batches, following: Spool | None, pool: Pool, routed: Routed
) -> dict[str, Any]:
    """The MLP, or shared and routed experts; fills `x` with their input and `following` with the block's output."""
    job, cfg = block.job, block.job.cfg
    for batch in range(len(batches)):
        source = batches.read(attended, batch)
        batches.write(x, batch, job.family.ffn_input(cfg, block.layer, block.weights(), source))
    facts: dict[str, Any] = {}
    with Spool(job.work / "added.tmp", x.rows, x.row_shape) as added:
        if cfg.moe is not None and cfg.is_moe(block.layer):
            routing = _route(block, cfg.moe, x, batches)
            routed(routing)
            facts["experts"] = run_experts(block, routing, x, added if following else None, batches.length, pool)
            if cfg.moe.shared:
                _dense(block, cfg.moe.names.shared, attended, x, added if following else None, batches)
        else:
            _dense(block, "mlp", attended, x, added if following else None, batches)
        if following is not None:
            for batch in range(len(batches)):
                before, more = batches.read(attended, batch), batches.read(added, batch)
                out = job.family.ffn_output(cfg, block.layer, block.weights(), before, more)
                batches.write(following, batch, out)
        added.remove()
    return facts


def _dense(block: Block, name: str, attended: Spool, x: Spool, added: Spool | None, batches: Batches) -> None:
    """The MLP `name`: solve it and add what it gives to `added`; with that, it is added to `attended`."""
    moe = block.job.cfg.moe
    linears = [linear for linear in block.linears if linear.name.rsplit(".", 1)[0] == name]

    def forward(watch: Watch, batch: int) -> Tensor:
        source, weights = batches.read(x, batch), block.weights(watch, batches.split(batch))
        if moe is not None and name == moe.names.shared:
            return run_shared(moe, weights, source)
        return swiglu(weights, name, source)

    def stream(batch: int) -> Tensor:
        before = batches.read(attended, batch)
        return before if added is None else before + batches.read(added, batch)

    part = Part(linears, forward, len(batches), batches.split)
    if attended.row_shape == x.row_shape and (added is not None or moe is None):
        part = replace(part, last=f"{name}.down_proj", stream=stream)
    if added is None:
        block.load(linears)
        block.solve_in_order(part)
        block.free(linears)
        return
    for batch, output, _ in _solved(block, part, batches):
        batches.write(added, batch, batches.read(added, batch) + output)


def _route(block: Block, moe: Moe, x: Spool, batches: Batches) -> Routing:
    parts = [
        route(moe, block.weights(), batches.read(x, batch).flatten(0, 1), batches.ids(batch).flatten())
        for batch in range(len(batches))
    ]
    return Routing(torch.cat([part.experts for part in parts]), torch.cat([part.shares for part in parts]))

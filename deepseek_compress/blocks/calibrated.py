"""One block with calibration: attention, then the MLP or the experts, each linear seeing what the changed ones give.

The hidden state of all samples lies on disk; a batch of it is in memory. Experts are solved one after the other with
their own tokens, so that no more than one expert and one Hessian is held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.blocks.job import Block, Forward, Job, Watch
from deepseek_compress.blocks.spool import Spool
from deepseek_compress.blocks.statistics import ROWS
from deepseek_compress.models.config import Linear, Moe, Role
from deepseek_compress.models.layers import swiglu
from deepseek_compress.models.moe import Routing, by_expert, route, run_expert, run_shared

BATCH_TOKENS = 2048  # fixed: another batch size has other roundings


class Batches:
    """How the rows of a spool (samples * length) are taken: whole samples, about BATCH_TOKENS tokens at a time."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens = tokens  # (samples, length)
        self.samples, self.length = tokens.shape
        self.step = max(1, BATCH_TOKENS // self.length)

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

    def positions(self, batch: int) -> Tensor:
        """(n, length): every sample starts at 0."""
        return torch.arange(self.length).expand(len(self.ids(batch)), -1)


def calibrated_block(job: Job, layer: int, hidden: Spool, batches: Batches, following: Spool | None) -> dict[str, Any]:
    """Change block `layer`; with `following`, store what it then gives. Returns the facts."""
    block = Block(job, layer)
    block.copy_rest()
    linears = {linear.name + suffix for linear in block.linears for suffix in (".weight", ".bias")}
    for name in block.names:
        if name not in linears:
            block.read(name)
    rows = hidden.rows
    with Spool(job.work / "attended.tmp", rows, hidden.row_shape) as attended:
        _attention(block, hidden, attended, batches)
        with Spool(job.work / "input.tmp", rows, (job.cfg.hidden_size,)) as x:
            facts = _ffn(block, attended, x, batches, following)
            x.remove()
        attended.remove()
    return {"linears": block.facts, **facts}


def _attention(block: Block, hidden: Spool, attended: Spool, batches: Batches) -> None:
    job = block.job
    linears = [linear for linear in block.linears if linear.role in (Role.ATTENTION, Role.INDEXER)]

    def forward(watch: Watch, batch: int) -> Tensor:
        x, weights = batches.read(hidden, batch), block.weights(watch)
        return job.family.attention_part(job.cfg, block.layer, weights, x, batches.positions(batch))

    block.load(linears)
    block.solve_in_order(linears, forward, len(batches))
    for batch in range(len(batches)):
        batches.write(attended, batch, forward(_plain, batch))
    block.free(linears)


def _ffn(block: Block, attended: Spool, x: Spool, batches: Batches, following: Spool | None) -> dict[str, Any]:
    """The MLP, or shared and routed experts; fills `x` with their input and `following` with the block's output."""
    job, cfg = block.job, block.job.cfg
    for batch in range(len(batches)):
        source = batches.read(attended, batch)
        batches.write(x, batch, job.family.ffn_input(cfg, block.layer, block.weights(), source))
    facts: dict[str, Any] = {}
    with Spool(job.work / "added.tmp", x.rows, x.row_shape) as added:
        if cfg.moe is not None and cfg.is_moe(block.layer):
            routing = _route(block, cfg.moe, x, batches)
            facts["experts"] = _experts(block, cfg.moe, routing, x, added if following else None)
            if cfg.moe.shared:
                _dense(block, cfg.moe.names.shared, x, added if following else None, batches)
        else:
            _dense(block, "mlp", x, added if following else None, batches)
        if following is not None:
            for batch in range(len(batches)):
                before, more = batches.read(attended, batch), batches.read(added, batch)
                out = job.family.ffn_output(cfg, block.layer, block.weights(), before, more)
                batches.write(following, batch, out)
        added.remove()
    return facts


def _dense(block: Block, name: str, x: Spool, added: Spool | None, batches: Batches) -> None:
    """The MLP `name`: solve it and add what it gives to `added`."""
    moe = block.job.cfg.moe
    linears = [linear for linear in block.linears if linear.name.rsplit(".", 1)[0] == name]

    def forward(watch: Watch, batch: int) -> Tensor:
        source = batches.read(x, batch)
        if moe is not None and name == moe.names.shared:
            return run_shared(moe, block.weights(watch), source)
        return swiglu(block.weights(watch), name, source)

    block.load(linears)
    block.solve_in_order(linears, forward, len(batches))
    if added is not None:
        for batch in range(len(batches)):
            batches.write(added, batch, batches.read(added, batch) + forward(_plain, batch))
    block.free(linears)


def _route(block: Block, moe: Moe, x: Spool, batches: Batches) -> Routing:
    parts = [
        route(moe, block.weights(), batches.read(x, batch).flatten(0, 1), batches.ids(batch).flatten())
        for batch in range(len(batches))
    ]
    return Routing(torch.cat([part.experts for part in parts]), torch.cat([part.shares for part in parts]))


def _experts(block: Block, moe: Moe, routing: Routing, x: Spool, added: Spool | None) -> dict[str, Any]:
    """Solve every expert with the tokens routed to it; add their outputs to `added`. Returns the coverage."""
    places = by_expert(routing, moe.experts)
    shares = routing.shares.flatten()
    for expert, linears in _by_expert(block.linears):
        chosen = places[expert]
        tokens = (chosen // moe.top_k).tolist()
        forward = _expert_forward(block, moe, expert, x, tokens)
        count = -(-len(tokens) // ROWS)
        block.load(linears)
        block.solve_in_order(linears, forward, count)
        if added is not None:
            for batch, part in enumerate(torch.split(chosen, ROWS) if len(chosen) else ()):
                y = forward(_plain, batch) * shares[part, None]
                added.add(tokens[batch * ROWS : (batch + 1) * ROWS], y)
        block.free(linears)
    counts = [len(place) for place in places]
    starved = [expert for expert, count in enumerate(counts) if count < block.job.change.min_tokens]
    return {"tokens": counts, "starved": starved}


def _expert_forward(block: Block, moe: Moe, expert: int, x: Spool, tokens: list[int]) -> Forward:
    def forward(watch: Watch, batch: int) -> Tensor:
        return run_expert(moe, block.weights(watch), expert, x.gather(tokens[batch * ROWS : (batch + 1) * ROWS]))

    return forward


def _by_expert(linears: Sequence[Linear]) -> Iterator[tuple[int, list[Linear]]]:
    found: dict[int, list[Linear]] = {}
    for linear in linears:
        if linear.role is Role.EXPERT:
            found.setdefault(int(linear.name.split(".")[2]), []).append(linear)
    yield from found.items()


def _plain(weights: Any) -> Any:
    return weights

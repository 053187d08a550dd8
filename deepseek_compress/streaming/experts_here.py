"""The routed experts of a block on a GPU: in this process, some at a time, their tokens in the device's memory.

A small matrix leaves most of a GPU idle, and each of a solver's many steps waits for its launch. So experts of one
shape are solved side by side, step by step: as many as `ROOM` bytes hold with their Hessians. What they add is summed
expert by expert, as in `experts`, so that the number that is solved together changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.models.config import Linear
from deepseek_compress.models.moe import Routing, by_expert, run_expert
from deepseek_compress.planning.device import memory_in_use, memory_limit
from deepseek_compress.streaming.block_run import BlockRun, Part, Run, Watch
from deepseek_compress.streaming.experts import ROWS, coverage
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.streaming.paired_forward import Split, alongside, pairs_first

SHARE = 0.25  # of the device's memory for the experts that are solved together, and half of what is free at most
MOST = 16
HESSIANS, COPIES = 3, 6  # of the widest input, and of the weights in float32, while an expert is solved


class Expert:
    """An expert with its tokens, on the device."""

    def __init__(self, run: Run, block: BlockRun, number: int, chosen: Tensor, length: int) -> None:
        moe = block.block.moe
        assert moe is not None
        self.stored: list[tuple[str, dict[str, Tensor]]] = []
        own = run.begin(block.block.layer, lambda name, parts: self.stored.append((name, parts)))
        self.run, self.moe, self.number, self.own = run, moe, number, own
        self.linears: Sequence[Linear] = [linear for linear in block.block.linears if linear.expert == number]
        self.pairs: int | None = None
        tokens = chosen // moe.top_k
        if run.paired:
            tokens, self.pairs = alongside(tokens, length)
        place = torch.full((int(tokens.max()) + 1 if len(tokens) else 0,), -1)  # in the flattened routing; -1: not sent
        place[chosen // moe.top_k] = chosen
        self.count = len(tokens) if self.pairs is None else self.pairs
        self.device = run.architecture.device
        self.places, self.tokens = (values.to(self.device) for values in (place[tokens], tokens))

    def part(self, x: HiddenStore) -> Part:
        """Return the expert as a part over its tokens, which lie in `x`."""
        path = self.run.work / f"expert-{self.number:05d}.kept"
        batches = -(-len(self.tokens) // ROWS)

        def forward(watch: Watch, batch: int) -> Tensor:
            some = x.gather(self.tokens[batch * ROWS : (batch + 1) * ROWS]).to(self.device)
            return run_expert(self.moe, self.own.weights(watch, self._split(batch)), self.number, some)

        def get(store: HiddenStore, batch: int) -> Tensor:
            return store.read(batch * ROWS, min(ROWS, store.rows - batch * ROWS)).to(self.device)

        def put(store: HiddenStore, batch: int, rows: Tensor) -> None:
            store.write(batch * ROWS, rows)

        last = self.linears[-1].name
        return Part(self.linears, forward, batches, len(self.tokens), path, put, get, self._split, last)

    def _split(self, batch: int) -> Split | None:
        rows = range(batch * ROWS, min((batch + 1) * ROWS, len(self.tokens)))
        return None if self.pairs is None else pairs_first(rows, self.pairs, self.device)

    def add(self, batch: int, given: Tensor, gate_weights: Tensor, added: HiddenStore) -> None:
        """Add what the expert gives for a batch of its tokens, times its gate weights; rows it was not sent stay."""
        rows = slice(batch * ROWS, (batch + 1) * ROWS)
        places = self.places[rows]
        weights = torch.where(places >= 0, gate_weights[places.clamp(min=0)], 0.0)
        added.add(self.tokens[rows], given * weights[:, None])


def run_here(
    run: Run, block: BlockRun, routing: Routing, x: HiddenStore, added: HiddenStore | None, length: int
) -> dict[str, Any]:
    """`experts.run_experts` on the device of the model: the same bytes as there on that device."""
    moe = block.block.moe
    assert moe is not None
    places, gate_weights = by_expert(routing, moe.experts), routing.gate_weights.flatten().to(run.architecture.device)
    counts: list[int] = []
    for start in range(0, moe.experts, step := together(run, block)):
        numbers = range(start, min(start + step, moe.experts))
        some = [Expert(run, block, number, places[number], length) for number in numbers]

        def add(number: int, batch: int, given: Tensor, some: list[Expert] = some) -> None:
            assert added is not None
            some[number].add(batch, given, gate_weights, added)

        visit(some, x, None if added is None else add)
        for expert in some:  # in their order, whatever was solved with what
            for name, parts in expert.stored:
                block.store(name, parts)
            block.facts += expert.own.facts
            counts.append(expert.count)
    return coverage(run, counts)


def visit(experts: Sequence[Expert], x: HiddenStore, take: Callable[[int, int, Tensor], None] | None) -> None:
    """Solve and run some experts: those with tokens for what they give, the others as far as they change.

    `take(number, batch, given)` is called with what each gives; None: nobody needs it.
    """
    reached = [number for number, expert in enumerate(experts) if take is not None and len(expert.tokens)]
    others = [n for n, expert in enumerate(experts) if n not in reached and expert.own.acts(expert.linears)]
    for some in (others, reached):
        if not some:
            continue
        parts = [(experts[number].own, experts[number].part(x)) for number in some]
        own = experts[some[0]].own
        if take is None or some is others:
            own.act_on(parts)
            continue
        for number, given in own.outputs_of(parts):
            for batch, out in given:
                take(some[number], batch, out)


def together(run: Run, block: BlockRun) -> int:
    """Choose how many experts are solved at a time."""
    linears = [linear for linear in block.block.linears if linear.expert == 0]
    widest = max(linear.columns for linear in linears)
    each = 4 * (HESSIANS * widest**2 + COPIES * sum(linear.rows * linear.columns for linear in linears))
    limit = memory_limit(run.architecture.device)
    spare = limit - memory_in_use(run.architecture.device)
    return max(1, min(MOST, int(min(SHARE * limit, spare / 2)) // each))

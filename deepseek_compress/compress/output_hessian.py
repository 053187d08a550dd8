"""Output Hessians: the mean of g g^T over the gradients of log p(y) by what each linear gives, y drawn from the model.

One pass of the first samples through the model as it is, then its blocks backward, one at a time; of a mixture of
experts one expert at a time. Routed experts get none: few tokens reach each, and what they add is a small part of the
error (reports/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.checkpoint.files import write_arrays
from deepseek_compress.compress.job import Job
from deepseek_compress.models import Architecture, Block, Linear, Role
from deepseek_compress.models.config import Moe
from deepseek_compress.models.layers import SCORES_AT_ONCE, swiglu
from deepseek_compress.models.moe import by_expert, route, run_expert, run_shared
from deepseek_compress.models.weights import Weights
from deepseek_compress.planning.costs import Work
from deepseek_compress.streaming.batches import BATCH_TOKENS, Batches
from deepseek_compress.streaming.experts import ROWS
from deepseek_compress.streaming.hidden_store import HELD, HiddenStore
from deepseek_compress.streaming.loop import Facts, Loop, Progress, Stream, Visit
from deepseek_compress.streaming.observe import Cost

WIDEST = 2048  # rows of a matrix: a linear with more has one for each equal part of its rows
LOGITS = 1 << 24  # of a piece of the head's output

Seen = Callable[[str, Tensor], None]  # (name of a linear in its block, gradients by its output)


@dataclass(frozen=True)
class OutputHessians:
    """Read from `folder`, where `collect` left them."""

    folder: Path

    def path(self, block: Block) -> Path:
        """The file of a block."""
        return self.folder / f"outputs-{block.layer:05d}.npz"

    def read(self, block: Block, linear: Linear) -> Tensor | None:
        """Read float32 (parts, rows of a part, rows of a part); None where there is none."""
        with np.load(self.path(block)) as saved:
            return torch.from_numpy(saved[linear.name]) if linear.name in saved.files else None


def parts(rows: int) -> int:
    """Into how many equal parts the rows of a linear are divided."""
    return next(count for count in range(-(-rows // WIDEST), rows + 1) if rows % count == 0)


def collect(job: Job, tokens: Tensor, progress: Progress) -> OutputHessians:
    """Find the output Hessians of every linear but the routed experts', from `tokens` int64 (samples, length)."""
    architecture, found = job.architecture, OutputHessians(job.work)
    states = Loop(
        (Stream(architecture, "state"),), tokens, job.work, "states", "output Hessians, block", last=True, keep=True
    )
    states.run(_Forward(), progress)
    above, last = Stream(architecture, "gradient"), states.output(states.streams[0])
    back = Loop((above,), tokens, job.work, "outputs", "output Hessians, back through block", backward=True)
    back.run(
        _Backward(found, states),
        progress,
        finished=lambda layer: found.path(architecture.blocks[layer]).is_file(),
        begin=lambda _, store: _top(architecture, Batches(tokens), last, store),
    )
    last.remove()
    return found


class _Forward:
    """Runs each block as it is."""

    @torch.no_grad()
    def visit(self, at: Visit) -> Facts:
        block = at.blocks[0]
        weights = block.weights()
        for batch in range(len(at.batches)):
            out = block.run(weights, at.batches.read(at.before[0], batch), at.batches.ids(batch))
            at.batches.write(at.after[0], batch, out)
        return {}


class _Backward:
    """Runs each block backward from its kept input, and keeps the output Hessians of its linears."""

    def __init__(self, found: OutputHessians, states: Loop) -> None:
        self.found, self.states = found, states

    def visit(self, at: Visit) -> Facts:
        block, sums = at.blocks[0], _Sums()
        path = self.states.path(self.states.streams[0], at.layer)
        hidden = HiddenStore(path, self.states.tokens.numel(), block.architecture.row_shape, existing=True)
        for batch in range(len(at.batches)):
            given, after = at.batches.read(hidden, batch), at.batches.read(at.before[0], batch)
            before = _back(block, given, after, at.batches.ids(batch), sums.add)
            if at.after:
                at.batches.write(at.after[0], batch, before)
        write_arrays(self.found.path(block), sums.means())
        hidden.remove()
        return {}


class _Sums:
    """Adds up the gradients by the outputs of the linears of one block."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        flat = gradient.reshape(-1, gradient.shape[-1])
        some = flat.view(len(flat), parts(flat.shape[1]), -1).transpose(0, 1)  # (parts, tokens, rows of a part)
        more = some.mT @ some
        self.found[name] = self.found[name].add_(more) if name in self.found else more
        self.tokens[name] = self.tokens.get(name, 0) + len(flat)

    def means(self) -> dict[str, Tensor]:
        return {name: total / self.tokens[name] for name, total in self.found.items()}


class _Watched:
    """`inner`, whose linears report the gradients by their outputs."""

    def __init__(self, inner: Weights, seen: Seen) -> None:
        self.inner, self.seen = inner, seen

    def __getitem__(self, name: str) -> Tensor:
        return self.inner[name]

    def __contains__(self, name: str) -> bool:
        return name in self.inner

    def linear(self, name: str, x: Tensor) -> Tensor:
        out = self.inner.linear(name, x)
        if out.requires_grad:
            out.register_hook(lambda gradient: self.seen(name, gradient))  # type: ignore[no-untyped-call]
        return out


def _top(architecture: Architecture, batches: Batches, last: HiddenStore, into: HiddenStore) -> None:
    """Fill `into` with the gradient of log p(y) by what the last block gave."""
    top, head = architecture.top(), architecture.source.read(architecture.head)
    draw = torch.Generator().manual_seed(0)
    for batch in range(len(batches)):
        hidden = batches.read(last, batch).detach().clone().requires_grad_()
        with torch.enable_grad():
            x = architecture.final_hidden(top, hidden)
        flat = x.detach().reshape(-1, x.shape[-1])
        by_x = []
        for some in torch.split(flat, max(1, LOGITS // len(head))):
            p = functional.linear(some, head).softmax(-1)
            drawn = torch.multinomial(p, 1, generator=draw)[:, 0]
            by_x.append(head[drawn] - p @ head)
        batches.write(into, batch, torch.autograd.grad(x, hidden, torch.cat(by_x).view_as(x))[0])


@torch.enable_grad()
def _back(block: Block, given: Tensor, after: Tensor, ids: Tensor, seen: Seen) -> Tensor:
    """The gradient by the input `given` of a block, from `after`, that by its output. Tells `seen` those between."""
    weights = _Watched(block.weights(), seen)
    hidden = given.detach().clone().requires_grad_()
    positions = torch.arange(ids.shape[1]).expand(len(ids), -1)
    attended = block.attention_part(weights, hidden, positions, None)
    leaf = attended.detach().requires_grad_()
    x = block.ffn_input(weights, leaf)
    added = torch.zeros_like(x).requires_grad_()  # what it holds does not matter: it is added
    by_leaf, by_added = torch.autograd.grad(block.ffn_output(weights, leaf, added), (leaf, added), after)
    by_x = _back_ffn(block, weights, x.detach(), ids, by_added)
    by_leaf = by_leaf + torch.autograd.grad(x, leaf, by_x)[0]
    return torch.autograd.grad(attended, hidden, by_leaf)[0]


def _back_ffn(block: Block, weights: _Watched, x: Tensor, ids: Tensor, after: Tensor) -> Tensor:
    """The gradient by the input x (n, length, hidden) of the MLP or the experts."""
    inner = x.requires_grad_()
    if (moe := block.moe) is None:
        return torch.autograd.grad(swiglu(weights, "mlp", inner), inner, after)[0]
    found = _back_experts(moe, weights.inner, x.detach(), ids, after)
    if moe.shared:
        found = found + torch.autograd.grad(run_shared(moe, weights, inner), inner, after)[0]
    return found


def _back_experts(moe: Moe, weights: Weights, x: Tensor, ids: Tensor, after: Tensor) -> Tensor:
    """Likewise of the routed experts, one after the other, and through what the router weighs them with."""
    flat, by_y = x.reshape(-1, x.shape[-1]).requires_grad_(), after.reshape(-1, after.shape[-1])
    routing = route(moe, weights, flat, ids.flatten())
    gates, by_gate = routing.shares.detach().flatten(), torch.zeros(routing.shares.numel())
    by_x = torch.zeros_like(by_y)
    for expert, places in enumerate(by_expert(routing, moe.experts)):
        for some in torch.split(places, ROWS) if len(places) else ():
            rows = some // moe.top_k
            inner = flat.detach()[rows].requires_grad_()
            y = run_expert(moe, weights, expert, inner)
            by_gate[some] = (y.detach() * by_y[rows]).sum(1)
            by_x.index_add_(0, rows, torch.autograd.grad(y, inner, by_y[rows] * gates[some, None])[0])
    through = torch.autograd.grad(routing.shares, flat, by_gate.view_as(routing.shares))[0]
    return (by_x + through).view_as(x)


def cost(architecture: Architecture, samples: int, length: int) -> Cost:
    """Two runs forward and one backward of `samples`, and the sums of every linear but the routed experts'."""
    cfg, tokens = architecture.cfg, samples * length
    products, largest = 2.0 * cfg.vocab_size * cfg.hidden_size, 0
    for block in architecture.blocks:
        held = rows = 0
        for linear in block.linears:
            if linear.role is Role.EXPERT and cfg.moe:
                products += 3 * linear.rows * linear.columns * cfg.moe.top_k / cfg.moe.experts
                continue
            own = linear.rows // parts(linear.rows)
            products += linear.rows * (3.0 * linear.columns + own)
            held, rows = held + linear.rows * (linear.columns + own), rows + linear.rows
        largest = max(largest, 4 * held + 24 * BATCH_TOKENS * (rows + 8 * cfg.hidden_size))
    stores = 8 * min(HELD, 4 * tokens * cfg.hidden_size) + 24 * SCORES_AT_ONCE
    return Cost(largest + stores + 12 * LOGITS + 4 * cfg.vocab_size * cfg.hidden_size, Work(2.0 * tokens * products))

"""Output Hessians: the mean of g g^T over the gradients of log p(y) by what each linear gives, y drawn from the model.

One pass of the first samples through the model as it is, its blocks run backward one at a time from the hidden states
between them; of a mixture of experts one expert at a time. Kept in the work directory, so that an interrupted run has
them. Routed experts have none: few tokens reach each, and what they add is a small part of the error (reports/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.blocks.calibrated import BATCH_TOKENS, Batches, embed_into, row_shape
from deepseek_compress.blocks.job import Job
from deepseek_compress.blocks.spool import Spool
from deepseek_compress.blocks.statistics import ROWS
from deepseek_compress.checkpoint.files import write_arrays
from deepseek_compress.costs import Work
from deepseek_compress.models.config import Linear, ModelConfig, Moe, Role
from deepseek_compress.models.layers import swiglu
from deepseek_compress.models.moe import by_expert, route, run_expert, run_shared
from deepseek_compress.models.weights import StreamedWeights, Weights

WIDEST = 2048  # rows of a matrix: a linear with more has one for each equal part of its rows
LOGITS = 1 << 24  # of a piece of the head's output

Seen = Callable[[str, Tensor], None]  # (name of a linear in its block, gradients by its output)


@dataclass(frozen=True)
class OutputHessians:
    """Read from `folder`, where `collect` left them."""

    folder: Path

    def path(self, layer: int) -> Path:
        """The file of a block."""
        return self.folder / f"outputs-{layer:05d}.npz"

    def read(self, layer: int, linear: Linear) -> Tensor | None:
        """float32 (parts, rows of a part, rows of a part); None where there is none."""
        with np.load(self.path(layer)) as saved:
            return torch.from_numpy(saved[linear.name]) if linear.name in saved.files else None


def parts(rows: int) -> int:
    """Into how many equal parts the rows of a linear are divided."""
    return next(count for count in range(-(-rows // WIDEST), rows + 1) if rows % count == 0)


class _Sums:
    """Adds up the gradients by the outputs of the linears of one block."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.tokens: dict[str, int] = {}

    def add(self, name: str, gradient: Tensor) -> None:
        flat = gradient.reshape(-1, gradient.shape[-1])
        some = flat.view(len(flat), parts(flat.shape[1]), -1).transpose(0, 1)  # (parts, tokens, rows of a part)
        self.found[name] = self.found.get(name, torch.zeros(())) + some.mT @ some
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
            out.register_hook(lambda gradient: self.seen(name, gradient))
        return out


def collect(job: Job, tokens: Tensor, progress: Callable[[int, int, str], None]) -> OutputHessians:
    """Output Hessians of every linear but the routed experts', from `tokens` int64 (samples, length)."""
    job.work.mkdir(parents=True, exist_ok=True)
    found, layers = OutputHessians(job.work), job.cfg.num_hidden_layers
    if all(found.path(layer).is_file() for layer in range(layers)):
        return found
    batches = Batches(tokens)
    states = _states(job, batches, lambda layer: progress(layer, 2 * layers, f"output Hessians, forward {layer}"))
    gradient = _top(job, batches, states.pop())
    for layer in reversed(range(layers)):
        progress(2 * layers - layer - 1, 2 * layers, f"output Hessians, block {layer}")
        sums, hidden = _Sums(), states.pop()
        for batch in range(len(batches)):
            given, after = batches.read(hidden, batch), batches.read(gradient, batch)
            batches.write(gradient, batch, _backward(job, layer, batches, batch, given, after, sums))
        write_arrays(found.path(layer), sums.means())
        hidden.remove()
    gradient.remove()
    return found


@torch.no_grad()
def _states(job: Job, batches: Batches, progress: Callable[[int], None]) -> list[Spool]:
    """The input of each block, and what the last one gives."""
    rows, shape = batches.tokens.numel(), row_shape(job.family, job.cfg)
    first = Spool(job.work / "state-00000.tmp", rows, shape)
    embed_into(first, job.source, job.family, job.cfg, batches.tokens)
    found = [first]
    for layer in range(job.cfg.num_hidden_layers):
        progress(layer)
        found.append(Spool(job.work / f"state-{layer + 1:05d}.tmp", rows, shape))
        weights = StreamedWeights(job.source, job.family.prefix(layer) + ".")
        for batch in range(len(batches)):
            hidden, ids = batches.read(found[-2], batch), batches.ids(batch)
            out = job.family.run_block(job.cfg, layer, weights, hidden, batches.positions(batch), tokens=ids)
            batches.write(found[-1], batch, out)
    return found


def _top(job: Job, batches: Batches, final: Spool) -> Spool:
    """The gradient of log p(y) by what the last block gave, in place of it."""
    family, cfg = job.family, job.cfg
    top = StreamedWeights(job.source, "")
    head = job.source.read(family.embedding if cfg.tie_word_embeddings else family.head)
    draw = torch.Generator().manual_seed(0)
    for batch in range(len(batches)):
        given = batches.read(final, batch)
        with torch.enable_grad():
            hidden = given.detach().clone().requires_grad_()
            x = family.final_hidden(cfg, top, hidden)
        flat, by_x = x.detach().reshape(-1, x.shape[-1]), torch.empty(x.numel() // x.shape[-1], x.shape[-1])
        for start in range(0, len(flat), max(1, LOGITS // len(head))):
            some = slice(start, start + max(1, LOGITS // len(head)))
            shares = functional.linear(flat[some], head).softmax(-1)
            drawn = torch.multinomial(shares, 1, generator=draw)
            by_x[some] = head[drawn[:, 0]] - shares @ head
        batches.write(final, batch, torch.autograd.grad(x, hidden, by_x.view_as(x))[0])
    return final


@torch.enable_grad()
def _backward(job: Job, layer: int, batches: Batches, batch: int, given: Tensor, after: Tensor, sums: _Sums) -> Tensor:
    """The gradient by the input `given` of block `layer`, from that by its output; adds to `sums`."""
    family, cfg = job.family, job.cfg
    weights = _Watched(StreamedWeights(job.source, family.prefix(layer) + "."), sums.add)
    hidden = given.detach().clone().requires_grad_()
    attended = family.attention_part(cfg, layer, weights, hidden, batches.positions(batch))
    leaf = attended.detach().requires_grad_()
    x = family.ffn_input(cfg, layer, weights, leaf)
    inner = x.detach().requires_grad_()
    added, by_routed = _added(job, layer, weights, inner, batches.ids(batch))
    total = added.detach().requires_grad_()
    out = family.ffn_output(cfg, layer, weights, leaf, total)
    by_leaf, by_total = torch.autograd.grad(out, (leaf, total), after)
    by_x = by_routed(by_total)
    if added.requires_grad:
        by_x = by_x + torch.autograd.grad(added, inner, by_total)[0]
    by_leaf = by_leaf + torch.autograd.grad(x, leaf, by_x)[0]
    return torch.autograd.grad(attended, hidden, by_leaf)[0]


def _added(
    job: Job, layer: int, weights: _Watched, x: Tensor, ids: Tensor
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """What MLP or experts add to x (n, length, hidden), and what gives the routed ones' gradient by x from its own."""
    moe = job.cfg.moe
    if moe is None or not job.cfg.is_moe(layer):
        return swiglu(weights, "mlp", x), torch.zeros_like
    shared = run_shared(moe, weights, x) if moe.shared else torch.zeros_like(x)
    return shared, lambda after: _routed(moe, weights, x, ids, after)


def _routed(moe: Moe, weights: _Watched, x: Tensor, ids: Tensor, after: Tensor) -> Tensor:
    """The gradient by x of what the routed experts add, one expert after the other, and through the router's shares."""
    flat = x.detach().reshape(-1, x.shape[-1]).requires_grad_()
    after = after.reshape(flat.shape)
    routing = route(moe, weights, flat, ids.flatten())
    shares, by_share = routing.shares.detach().flatten(), torch.zeros(routing.shares.numel())
    by_x = torch.zeros_like(after)
    for expert, places in enumerate(by_expert(routing, moe.experts)):
        for some in torch.split(places, ROWS):
            rows = some // moe.top_k
            inner = flat.detach()[rows].requires_grad_()
            given = run_expert(moe, weights.inner, expert, inner)
            by_share[some] = (given.detach() * after[rows]).sum(1)
            by_x.index_add_(0, rows, torch.autograd.grad(given, inner, after[rows] * shares[some, None])[0])
    through = torch.autograd.grad(routing.shares, flat, by_share.view_as(routing.shares), allow_unused=True)[0]
    return (by_x if through is None else by_x + through).view_as(x)


def cost(cfg: ModelConfig, linears: list[list[Linear]], samples: int, length: int) -> tuple[int, Work]:
    """Bytes and work: two runs forward and one backward of `samples`, and the sums of every linear."""
    tokens, total, largest = samples * length, 2.0 * cfg.vocab_size * cfg.hidden_size, 0
    for block in linears:
        for linear in block:
            routed = linear.role is Role.EXPERT
            share = cfg.moe.top_k / cfg.moe.experts if routed and cfg.moe else 1.0
            total += linear.rows * (3 * share * linear.columns + (0 if routed else linear.rows / parts(linear.rows)))
        own = [linear for linear in block if linear.role is not Role.EXPERT]
        held = sum(linear.rows * (linear.columns + linear.rows // parts(linear.rows)) for linear in own)
        largest = max(largest, 4 * held + 24 * BATCH_TOKENS * sum(linear.rows for linear in own))
    states = 4 * tokens * cfg.hidden_size * (len(linears) + 1)
    return largest + states + 12 * LOGITS + 4 * cfg.vocab_size * cfg.hidden_size, Work(2.0 * tokens * total)

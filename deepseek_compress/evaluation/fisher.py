"""The same losses from gradients: a second-order estimate for all units and options by one pass back.

For a small change D of a unit's weights the KL of the output is 1/2 D^T F D, F the Fisher information (Kunstner et al.
2019, arXiv 1905.12558, section 2), and with y drawn from the original's own prediction at each position t of a window

    D^T F D = E[(sum over t of <D, grad log p(y_t)>)^2]      the gradients of different positions are uncorrelated,

so one draw and one backward pass a window give one term of the mean for every D at once. Its relative error is
sqrt(2 / windows). Blocks are run backward one at a time, from the inputs that `sensitivity` keeps on disk. Left out:
the third order, which 2 bits have, and what a change does to the choice of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.evaluation import sensitivity
from deepseek_compress.evaluation.sensitivity import Choice, Search, quantized, run_original, statistics_of
from deepseek_compress.models import ModelConfig
from deepseek_compress.models.weights import ResidentWeights
from deepseek_compress.planning.costs import Memory, Work, total
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.streaming.loop import Facts, Loop, Progress, Stream, Visit
from deepseek_compress.workers import Pool


def estimate(search: Search, pool: Pool, progress: Progress) -> list[list[float]]:
    """Return the loss of each choice at each of its options, nats a position; goes on where an interrupted run
    stopped."""
    layers = len(search.architecture.blocks)
    run_original(search, pool, progress)
    stream = Stream(search.architecture, "gradient")
    loop = Loop((stream,), search.judging, search.work, "fisher", "gradients", backward=True, last=True, shared=True)
    blocks = loop.run(
        _Backward(pool),
        lambda done, _, note: progress(layers + 2 * done, 3 * layers, note),
        begin=lambda _, store: _first(pool, store),
    )
    found: dict[int, list[float]] = {}
    for layer, facts in enumerate(blocks):
        found |= dict(zip(search.at(layer), facts["losses"], strict=True))
    return [found[place] for place in range(len(search.choices))]


def _first(pool: Pool, store: HiddenStore) -> None:
    list(pool.run(_top, [store.path]))


class _Backward:
    """Runs each block backward in a task."""

    def __init__(self, pool: Pool) -> None:
        self.pool = pool

    def visit(self, at: Visit) -> Facts:
        (losses,) = self.pool.run(_block, [(at.layer, at.before[0].path, at.after[0].path)])
        return {"losses": losses}


def cost(cfg: ModelConfig, choices: Sequence[Choice], judging: int, fitting: int) -> tuple[Memory, Work, int]:
    """As `sensitivity.cost`: forward and back once; a task holds a block, its gradients and every option of it."""
    once = tuple(Choice(choice.group, choice.options[:1]) for choice in choices)
    memory, work, stores = sensitivity.cost(cfg, once, judging, fitting)
    blocks: dict[int, int] = {}
    for choice in choices:
        taken = choice.group.weights * (len(choice.options) + 1)
        blocks[choice.group.block.layer] = blocks.get(choice.group.block.layer, 0) + taken
    weights = sum(choice.group.weights for choice in choices)
    back = Work(4.0 * judging * weights, 0.0, 0.0)
    return Memory(0, 0, memory.task + 4 * max(blocks.values())), total([work, back]), 2 * stores


def _top(search: Search, into: Path) -> None:
    """Run a task: the gradient of log p(y) by what leaves the last block, y drawn."""
    architecture, layers = search.architecture, len(search.architecture.blocks)
    head, top = architecture.source.read(architecture.head, device=architecture.device), architecture.top()
    draw = torch.Generator().manual_seed(0)

    def gradient(window: int, hidden: Tensor, after: Tensor) -> Tensor:
        scores = functional.linear(architecture.final_hidden(top, hidden), head).log_softmax(-1)[0]
        drawn = torch.multinomial(scores.detach().exp().cpu(), 1, generator=draw).to(scores.device)
        return torch.autograd.grad(scores.gather(1, drawn).sum(), hidden)[0]

    _backward(search, layers, search.work / f"judging-{layers:05d}.f32", into, gradient)


def _block(search: Search, task: tuple[int, Path, Path]) -> list[list[float]]:
    """Return a task: the losses of a block's groups, and the gradient by its input."""
    layer, above, into = task
    here = search.architecture.blocks[layer]
    block = here.resident()
    statistics = statistics_of(search, here, block)
    choices = [search.choices[place] for place in search.at(layer)]
    moved = [
        [
            {
                name: new - block[name]
                for name, new in quantized(search, choice.group, option, block, statistics).items()
            }
            for option in choice.options
            if option is not None
        ]
        for choice in choices
    ]
    del statistics
    wanted = {f"{linear.name}.weight": block[f"{linear.name}.weight"] for c in choices for linear in c.group.linears}
    leaves = {name: weight.requires_grad_() for name, weight in wanted.items()}
    squares = [[0.0] * len(options) for options in moved]

    def gradient(window: int, hidden: Tensor, after: Tensor) -> Tensor:
        tokens = search.judging[window : window + 1].to(here.architecture.device)
        out = here.run(ResidentWeights({**block, **leaves}), hidden, tokens)
        found = torch.autograd.grad(out, [hidden, *leaves.values()], after, allow_unused=True)
        by_name = {name: part for name, part in zip(leaves, found[1:], strict=True) if part is not None}
        for sums, options in zip(squares, moved, strict=True):
            for number, move in enumerate(options):
                moved_by = sum(float((move[name] * by_name[name]).sum()) for name in move if name in by_name)
                sums[number] += moved_by**2
        return found[0]

    _backward(search, layer, above, into, gradient)
    found = []
    for choice, sums in zip(choices, squares, strict=True):
        each = iter(sums)
        found.append([0.0 if o is None else 0.5 * next(each) / search.judging.numel() for o in choice.options])
    return found


def _backward(
    search: Search, layer: int, above: Path, into: Path, gradient: Callable[[int, Tensor, Tensor], Tensor]
) -> None:
    """`gradient(window, hidden, after)` of each window into the store `into`: by `hidden`, which enters the block.

    hidden (1, length, ...); after: the same by what leaves the block, from the store `above`.
    """
    windows, length = search.judging.shape
    shape, device = search.architecture.row_shape, search.architecture.device
    opened = (HiddenStore(path, search.judging.numel(), shape, existing=True, resident=0) for path in (above, into))
    with search.open("judging", layer) as before, next(opened) as after, next(opened) as result:
        for window in range(windows):
            hidden, given = (store.read(window * length, length).unsqueeze(0).to(device) for store in (before, after))
            with torch.enable_grad():
                found = gradient(window, hidden.requires_grad_(), given)
            result.write(window * length, found[0].cpu())

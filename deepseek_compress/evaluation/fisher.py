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

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.blocks.spool import Spool
from deepseek_compress.checkpoint.files import kept, read_sealed, write_sealed
from deepseek_compress.costs import Memory, Work, total
from deepseek_compress.evaluation import sensitivity
from deepseek_compress.evaluation.sensitivity import (
    Choice,
    Search,
    forward,
    quantized,
    read_block,
    run_original,
    statistics_of,
)
from deepseek_compress.models import ModelConfig
from deepseek_compress.models.weights import ResidentWeights, StreamedWeights
from deepseek_compress.workers import Pool


def estimate(search: Search, pool: Pool, progress: Callable[[int, int, str], None]) -> list[list[float]]:
    """The loss of each choice at each of its options, nats a position; goes on where an interrupted run stopped."""
    layers = search.cfg.num_hidden_layers
    run_original(search, pool, lambda layer: progress(layer, 3 * layers, "the original"))
    found: list[list[float]] = [[] for _ in search.choices]
    for layer in range(layers, -1, -1):
        progress(layers + 2 * (layers - layer), 3 * layers, "gradients")
        file = search.work / f"fisher-{layer:05d}.json"
        if kept(file) is None:
            (losses,) = pool.run(_block if layer < layers else _top, [layer])
            write_sealed(file, {"losses": losses})
        for place, loss in zip(search.at(layer), read_sealed(file)["losses"], strict=True):
            found[place] = loss
    return found


def cost(cfg: ModelConfig, choices: Sequence[Choice], judging: int, fitting: int) -> tuple[Memory, Work, int]:
    """As `sensitivity.cost`: forward and back once; a task holds a block, its gradients and every option of it."""
    once = tuple(Choice(choice.unit, choice.options[:1]) for choice in choices)
    memory, work, spools = sensitivity.cost(cfg, once, judging, fitting)
    blocks: dict[int, int] = {}
    for choice in choices:
        taken = choice.unit.weights * (len(choice.options) + 1)
        blocks[choice.unit.layer] = blocks.get(choice.unit.layer, 0) + taken
    weights = sum(choice.unit.weights for choice in choices)
    back = Work(4.0 * judging * weights, 0.0, 0.0)
    return Memory(0, 0, memory.task + 4 * max(blocks.values())), total([work, back]), 2 * spools


def _top(search: Search, layers: int) -> list[list[float]]:
    """A task: the gradient of log p(y) by what leaves the last block, y drawn; into the spool of that place."""
    family, cfg = search.family, search.cfg
    top = StreamedWeights(search.source, "")
    head = search.source.read(family.embedding if cfg.tie_word_embeddings else family.head)
    draw = torch.Generator().manual_seed(0)

    def gradient(window: int, hidden: Tensor, after: Tensor) -> Tensor:
        scores = functional.linear(family.final_hidden(cfg, top, hidden), head).log_softmax(-1)[0]
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        return torch.autograd.grad(scores.gather(1, drawn).sum(), hidden)[0]

    _backward(search, layers, gradient)
    return []


def _block(search: Search, layer: int) -> list[list[float]]:
    """A task: the losses of a block's units, and the gradient by its input."""
    block = read_block(search, layer)
    statistics = statistics_of(search, layer, block)
    choices = [search.choices[place] for place in search.at(layer)]
    moved = [
        [
            {name: new - block[name] for name, new in quantized(search, choice.unit, option, block, statistics).items()}
            for option in choice.options
            if option is not None
        ]
        for choice in choices
    ]
    del statistics
    wanted = {f"{linear.name}.weight": block[f"{linear.name}.weight"] for c in choices for linear in c.unit.linears}
    leaves = {name: weight.requires_grad_() for name, weight in wanted.items()}
    squares = [[0.0] * len(options) for options in moved]

    def gradient(window: int, hidden: Tensor, after: Tensor) -> Tensor:
        tokens = search.judging[window : window + 1]
        out = forward(search, layer, ResidentWeights({**block, **leaves}), hidden, tokens)
        found = torch.autograd.grad(out, [hidden, *leaves.values()], after, allow_unused=True)
        by_name = {name: part for name, part in zip(leaves, found[1:], strict=True) if part is not None}
        for sums, options in zip(squares, moved, strict=True):
            for number, move in enumerate(options):
                moved_by = sum(float((move[name] * by_name[name]).sum()) for name in move if name in by_name)
                sums[number] += moved_by**2
        return found[0]

    _backward(search, layer, gradient)
    found = []
    for choice, sums in zip(choices, squares, strict=True):
        each = iter(sums)
        found.append([0.0 if o is None else 0.5 * next(each) / search.judging.numel() for o in choice.options])
    return found


def _backward(search: Search, layer: int, gradient: Callable[[int, Tensor, Tensor], Tensor]) -> None:
    """`gradient(window, hidden, after)` of each window into the spool of `layer`: by `hidden`, which enters the block.

    hidden (1, length, ...); after: the same by what leaves the block, which the top does not read.
    """
    windows, length = search.judging.shape
    top = layer == search.cfg.num_hidden_layers
    path, states = search.spool("gradient", layer), search.spool("judging", layer)
    above = states if top else search.spool("gradient", layer + 1)
    temporary = Spool(path.with_suffix(".tmp"), search.judging.numel(), search.row_shape, held=0)
    with search.open(states, search.judging) as before, search.open(above, search.judging) as after, temporary as into:
        for window in range(windows):
            hidden, given = (spool.read(window * length, length).unsqueeze(0) for spool in (before, after))
            with torch.enable_grad():
                found = gradient(window, hidden.requires_grad_(), given)
            into.write(window * length, found[0])
        into.rename(path)

"""Sensitivity: the KL of the model's output when one unit alone is stored in fewer bits, measured.

    loss(u, o) = mean over positions of KL(p || q)     p of the original, q of the original with unit u stored as o

A unit is what serving engines fuse. The original runs once, and the input of each block is kept on disk. Blocks are
tasks: a task quantises each unit of its block as each option says, with statistics of the original's inputs, runs
the block once for each of them, and takes the result through the blocks after it, one block in memory at a time.
What was computed before the block is never computed again. Text that judges gives no statistics.

To first order in the losses they add up (the cross terms of different units' errors are left out); `joint` measures
what a whole assignment loses, so that the sum can be held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from deepseek_compress.checkpoint.files import kept, read_sealed, remove, write_sealed
from deepseek_compress.compress.accumulate import Accumulator
from deepseek_compress.compress.forecast import HESSIANS
from deepseek_compress.compress.fused_groups import FusedGroup
from deepseek_compress.compress.job import by_input
from deepseek_compress.compress.selection import Selection
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.models import Architecture, Block, ModelConfig
from deepseek_compress.models.weights import HookedWeights, ResidentWeights
from deepseek_compress.numerics.types import Quantized, Statistics, WeightQuantizer
from deepseek_compress.planning.costs import Memory, Work, total
from deepseek_compress.streaming import head
from deepseek_compress.streaming.batches import Batches
from deepseek_compress.streaming.collect import feeding
from deepseek_compress.streaming.head import HeadInput
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.streaming.loop import Facts, Loop, Progress, Stream, Visit
from deepseek_compress.workers import Pool

Tensors = Mapping[str, Tensor]  # of a block, by local name, float32


class Choice(NamedTuple):
    """A group and what it may become: a quantiser with its group size, or None: it stays as it is."""

    group: FusedGroup
    options: tuple[WeightQuantizer | None, ...]


@dataclass(frozen=True)
class Search:
    """Description of the search: plain values, so that any process can do a part of it."""

    architecture: Architecture
    choices: tuple[Choice, ...]
    needs: frozenset[str]  # statistics that the quantisers take
    min_tokens: int  # a linear whose input fewer tokens reach is solved without statistics
    judging: Tensor  # int64 (windows, length)
    fitting: Tensor  # int64 (windows, length), for statistics
    work: Path

    def at(self, layer: int) -> list[int]:
        """Return the choices of a block, by their places."""
        return [place for place, choice in enumerate(self.choices) if choice.group.block.layer == layer]

    @property
    def texts(self) -> dict[str, Tensor]:
        """The windows that run through the original."""
        return {"judging": self.judging, **({"fitting": self.fitting} if self.needs else {})}

    def loop(self, text: str, note: str = "block") -> Loop:
        """Return the loop over a text ("judging", "fitting", "joint") whose stores, all of them, other processes
        read."""
        tokens = self.texts.get(text, self.judging)
        stream = Stream(self.architecture, text)
        return Loop((stream,), tokens, self.work, text, note, last=True, keep=True, shared=True)

    def batches(self, tokens: Tensor) -> Batches:
        """Of a text, on the device that computes."""
        return Batches(tokens, device=self.architecture.device)

    def open(self, text: str, place: int) -> HiddenStore:
        """Return the states of a text before block `place`."""
        path = self.work / f"{text}-{place:05d}.f32"
        tokens = self.texts.get(text, self.judging)
        return HiddenStore(path, tokens.numel(), self.architecture.row_shape, existing=True, resident=0)


def measure(search: Search, pool: Pool, progress: Progress) -> list[list[float]]:
    """Return the loss of each choice at each of its options, nats a position; goes on where an interrupted run
    stopped."""
    layers = len(search.architecture.blocks)
    # Of each block: every option runs through it and all that follow; the original's run costs little in comparison
    work = [sum(len(search.choices[at].options) for at in search.at(n)) * (layers - n) for n in range(layers)]
    run_original(search, pool, lambda done, _, note: progress(0, sum(work), note))
    tasks = [layer for layer in range(layers) if kept(_losses_file(search, layer)) is None]
    done = sum(work) - sum(work[layer] for layer in tasks)
    for layer, losses in zip(tasks, pool.run(_losses, tasks), strict=True):
        write_sealed(_losses_file(search, layer), {"losses": losses})
        done += work[layer]
        progress(done, sum(work), "one group at a time")
    found: dict[int, list[float]] = {}
    for layer in range(layers):
        found |= dict(zip(search.at(layer), read_sealed(_losses_file(search, layer))["losses"], strict=True))
    return [found[place] for place in range(len(search.choices))]


def _losses_file(search: Search, layer: int) -> Path:
    return search.work / f"losses-{layer:05d}.json"


def cost(cfg: ModelConfig, choices: Sequence[Choice], judging: int, fitting: int) -> tuple[Memory, Work, int]:
    """From shapes: memory of a task, work of all tasks, bytes of the stores; of so many tokens that judge and fit.

    A task holds a block, a changed unit, the Hessians of the block with what factoring the largest takes, and
    the states of all its variants.
    """
    layers: dict[int, list[Choice]] = {}
    for choice in choices:
        layers.setdefault(choice.group.block.layer, []).append(choice)
    counts = [sum(len(choice.options) for choice in layers.get(n, ())) for n in range(cfg.num_hidden_layers)]
    task, work = 0, []
    for layer, found in layers.items():
        linears = [linear for choice in found for linear in choice.group.linears]
        weights = sum(choice.group.weights for choice in found)
        inputs = [group[0].columns for group in by_input(linears)] if fitting else []
        numbers = weights + max(choice.group.weights for choice in found) + sum(n * n for n in inputs)
        numbers += HESSIANS * max((n * n for n in inputs), default=0)
        numbers += (counts[layer] + 1) * judging * cfg.hidden_size + cfg.vocab_size * cfg.hidden_size
        task = max(task, 4 * numbers + 48 * head.LOGITS)
        work.append(_work(cfg, found, sum(counts[: layer + 1]), judging, fitting, sum(n * n for n in inputs)))
    logits = 2.0 * sum(counts) * judging * cfg.vocab_size * cfg.hidden_size
    stores = 4 * (judging + fitting) * (cfg.num_hidden_layers + 1) * cfg.hidden_size
    return Memory(0, 0, task), total([Work(logits), *work]), stores


def _work(
    cfg: ModelConfig, found: Sequence[Choice], variants: int, judging: int, fitting: int, hessians: float
) -> Work:
    """Of one block: once for all text, again for statistics, and once for each of the `variants` that reach it."""
    routed = 1.0 if cfg.moe is None else cfg.moe.top_k / cfg.moe.experts
    active = sum(c.group.weights * (routed if c.group.linears[0].expert is not None else 1.0) for c in found)
    tokens = judging * (variants + 1) + 2 * fitting
    solved = sum(c.group.weights * sum(option is not None for option in c.options) for c in found)
    return Work(2.0 * active * tokens + 1.1 * hessians * fitting, 120.0 * cfg.hidden_size * tokens, solved)


def run_original(search: Search, pool: Pool, progress: Progress) -> None:
    """Store the input of each block, and the output of the last, for each text; what is there already stays."""
    layers = len(search.architecture.blocks)
    for text in search.texts:
        search.loop(text).run(
            _InTasks(pool, _original, text), lambda done, _, note: progress(done, 3 * layers, "the original")
        )


def joint(search: Search, chosen: Sequence[int], pool: Pool) -> float:
    """Return the loss with every group stored as its option of `chosen` says."""
    for left in search.work.glob("joint-*"):  # of an interrupted run, perhaps with another target
        remove(left)
    search.loop("joint").run(_InTasks(pool, _joint, tuple(chosen)))
    (loss,) = pool.run(_joint_loss, [None])
    return loss


@dataclass(frozen=True)
class _InTasks:
    """Visits each block in a task of the pool: `function(search, (layer, what, path before, path after))`."""

    pool: Pool
    function: Callable[[Search, tuple[int, Any, Path, Path]], None]
    what: Any

    def visit(self, at: Visit) -> Facts:
        list(self.pool.run(self.function, [(at.layer, self.what, at.before[0].path, at.after[0].path)]))
        return {}


def _original(search: Search, task: tuple[int, str, Path, Path]) -> None:
    """Run a task: one block for all windows of a text, from store to store."""
    layer, text, before, after = task
    block = search.architecture.blocks[layer]
    _advance(search, block, block.resident(), search.texts[text], before, after)


def _joint(search: Search, task: tuple[int, Sequence[int], Path, Path]) -> None:
    """Run a task: a block with all its groups as they were chosen, from store to store."""
    layer, chosen, before, after = task
    block = search.architecture.blocks[layer]
    tensors = block.resident()
    statistics, changed = statistics_of(search, block, tensors), dict(tensors)
    for place in search.at(layer):
        quantizer = search.choices[place].options[chosen[place]]
        if quantizer is not None:
            changed |= quantized(search, search.choices[place].group, quantizer, tensors, statistics)
    _advance(search, block, changed, search.judging, before, after)


def _advance(search: Search, block: Block, tensors: Tensors, tokens: Tensor, before: Path, after: Path) -> None:
    """Run a block for all rows of a store, into another."""
    batches, weights, shape = search.batches(tokens), ResidentWeights(tensors), search.architecture.row_shape
    stores = (HiddenStore(path, tokens.numel(), shape, existing=True, resident=0) for path in (before, after))
    with next(stores) as source, next(stores) as target:
        batches.advance(block, weights, source, target)


def _joint_loss(search: Search, _: None) -> float:
    with search.open("joint", len(search.architecture.blocks)) as states:
        return _divergences(search, [states])[0]


def _losses(search: Search, layer: int) -> list[list[float]]:
    """Return a task: the losses of the groups of one block."""
    if not any(search.choices[place].options != (None,) for place in search.at(layer)):
        return [[0.0] * len(search.choices[place].options) for place in search.at(layer)]
    block = search.architecture.blocks[layer]
    tensors = block.resident()
    statistics = statistics_of(search, block, tensors)
    batches, places, variants = search.batches(search.judging), [], []
    with search.open("judging", layer) as before:
        for place in search.at(layer):
            group, options = search.choices[place]
            for option, quantizer in enumerate(options):
                if quantizer is not None:
                    changed = {**tensors, **quantized(search, group, quantizer, tensors, statistics)}
                    variants.append(_in_memory(search, block, changed, batches, before))
                    places.append((place, option))
    del statistics, tensors
    streams = tuple(Stream(search.architecture) for _ in variants)
    last = _Last(variants)
    Loop(streams, search.judging, None, last=True, first=layer + 1).run(last, given=tuple(variants))
    losses = dict(zip(places, _divergences(search, last.states), strict=True))
    return [[losses.get((p, o), 0.0) for o in range(len(search.choices[p].options))] for p in search.at(layer)]


class _Last:
    """Runs every variant through a block that is read once, and remembers what leaves the last."""

    def __init__(self, states: Sequence[HiddenStore]) -> None:
        self.states = states

    def visit(self, at: Visit) -> Facts:
        block = at.blocks[0]
        weights = ResidentWeights(block.resident())
        for before, after in zip(at.before, at.after, strict=True):
            at.batches.advance(block, weights, before, after)
        self.states = at.after
        return {}


def _in_memory(search: Search, block: Block, tensors: Tensors, batches: Batches, before: HiddenStore) -> HiddenStore:
    """Return what a block gives for the judging windows."""
    after = HiddenStore(None, search.judging.numel(), search.architecture.row_shape)
    batches.advance(block, ResidentWeights(tensors), before, after)
    return after


def statistics_of(search: Search, block: Block, tensors: Tensors) -> dict[str, Statistics]:
    """Return what the inputs of the block look like in the original, by `Linear.input`; none where none is needed."""
    if not search.needs:
        return {}
    wanted = [linear for place in search.at(block.layer) for linear in search.choices[place].group.linears]
    first = {group[0].name: group[0].input for group in by_input(wanted)}
    sums = {source: Accumulator(search.needs) for source in first.values()}

    look = feeding({name: sums[source] for name, source in first.items()})
    watched = HookedWeights(ResidentWeights(tensors), look)
    batches = search.batches(search.fitting)
    with search.open("fitting", block.layer) as source:
        for batch in range(len(batches)):
            block.run(watched, batches.read(source, batch), batches.ids(batch))
    found = {key: total.statistics(block.prefix + key) for key, total in sums.items()}
    return {key: s if s.tokens >= search.min_tokens else Statistics(s.tokens) for key, s in found.items()}


def quantized(
    search: Search,
    group: FusedGroup,
    quantizer: WeightQuantizer,
    tensors: Tensors,
    statistics: Mapping[str, Statistics],
) -> dict[str, Tensor]:
    """Return the weights of a group as they would be loaded, by local name."""
    own = dict.fromkeys(group.names, quantizer)
    solver = LinearSolver(Selection(frozenset(), None, own=own), None, quantizer, search.min_tokens)
    found: dict[str, Tensor] = {}
    for linears in by_input(group.linears):
        pairs = [(linear, tensors[linear.name + ".weight"]) for linear in linears]
        solved = solver.solve(group.block, pairs, statistics.get(linears[0].input, Statistics()))
        for linear, new in zip(linears, solved, strict=True):
            assert isinstance(new.stored, Quantized)
            found[linear.name + ".weight"] = new.stored.dequantize()
    return found


def _divergences(search: Search, variants: Sequence[HiddenStore]) -> list[float]:
    """Return the mean KL of each variant from the original, from what leaves its last block, batch by batch."""
    architecture, batches = search.architecture, search.batches(search.judging)
    weight = architecture.source.read(architecture.head, device=architecture.device)
    sums = [0.0] * len(variants)
    with search.open("judging", len(architecture.blocks)) as original:
        for batch in range(len(batches)):
            rows = [
                architecture.final_hidden(architecture.top(), batches.read(store, batch)).flatten(0, 1)
                for store in (original, *variants)
            ]
            models = [HeadInput.of(x, weight) for x in rows]
            found = head.scores(models, batches.ids(batch).flatten())  # which token follows has no say in the KL
            sums = [before + float(kl) for before, kl in zip(sums, found.kl[1:].sum(1), strict=True)]
    return [total / search.judging.numel() for total in sums]

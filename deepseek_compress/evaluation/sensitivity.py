"""What it costs to store one unit of a model in fewer bits and nothing else: KL of the model's output, measured.

    loss(u, o) = mean over positions of KL(p || q)     p of the original, q of the original with unit u stored as o

A unit is what serving engines fuse. The original runs once, and the input of each block is kept on disk. Blocks are
tasks: a task quantises each unit of its block as each option says, with statistics of the original's inputs, runs
the block once for each of them, and takes what comes out through the blocks after it, one block in memory at a time.
What was computed before the block is never computed again. Text that judges gives no statistics.

To first order in the losses they add up (the cross terms of different units' errors are left out); `joint` measures
what a whole assignment loses, so that the sum can be held against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.blocks.calibrated import Batches, embed_into, row_shape
from deepseek_compress.blocks.change import LinearChange
from deepseek_compress.blocks.forecast import HESSIANS
from deepseek_compress.blocks.job import by_input
from deepseek_compress.blocks.selection import Selection
from deepseek_compress.blocks.spool import Spool
from deepseek_compress.blocks.statistics import Accumulator
from deepseek_compress.blocks.units import Unit
from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.checkpoint.files import kept, read_sealed, write_sealed
from deepseek_compress.costs import Memory, Work, total
from deepseek_compress.models import Family, ModelConfig
from deepseek_compress.models.weights import ObservingWeights, ResidentWeights, StreamedWeights, Weights
from deepseek_compress.numerics.types import Quantized, Statistics, WeightQuantizer
from deepseek_compress.workers import Pool

CHUNK_ELEMENTS = 1 << 22  # rows x vocabulary at a time
Tensors = Mapping[str, Tensor]  # of a block, by local name, float32


class Choice(NamedTuple):
    """A unit and what it may become: a quantiser with its group size, or None: it stays as it is."""

    unit: Unit
    options: tuple[WeightQuantizer | None, ...]


@dataclass(frozen=True)
class Search:
    """What is measured: plain values, so that any process can do a part of it."""

    source: Checkpoint
    family: Family
    cfg: ModelConfig
    choices: tuple[Choice, ...]
    needs: frozenset[str]  # statistics that the quantisers take
    min_tokens: int  # a linear whose input fewer tokens reach is solved without statistics
    judging: Tensor  # int64 (windows, length)
    fitting: Tensor  # int64 (windows, length), for statistics
    work: Path

    def at(self, layer: int) -> list[int]:
        """The choices of a block, by their places."""
        return [place for place, choice in enumerate(self.choices) if choice.unit.layer == layer]

    def spool(self, text: str, layer: int) -> Path:
        """Where the inputs of block `layer` lie; the last are what leaves the last block."""
        return self.work / f"{text}-{layer:05d}.f32"

    @property
    def texts(self) -> dict[str, Tensor]:
        """The windows that run through the original."""
        return {"judging": self.judging, **({"fitting": self.fitting} if self.needs else {})}

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Of what blocks hand on for a token."""
        return row_shape(self.family, self.cfg)

    def open(self, path: Path, tokens: Tensor) -> Spool:
        """A spool that was written for `tokens`."""
        return Spool(path, tokens.numel(), self.row_shape, existing=True, held=0)

    def read(self, path: Path) -> list[Tensor]:
        """The whole of a spool of the judging windows: batches of (n, length, ...)."""
        batches = Batches(self.judging)
        with self.open(path, self.judging) as spool:
            return [batches.read(spool, batch) for batch in range(len(batches))]


def measure(search: Search, pool: Pool, progress: Callable[[int, int, str], None]) -> list[list[float]]:
    """The loss of each choice at each of its options, nats a position; goes on where an interrupted run stopped."""
    layers = search.cfg.num_hidden_layers
    run_original(search, pool, lambda layer: progress(layer, 3 * layers, "the original"))
    files = {layer: search.work / f"losses-{layer:05d}.json" for layer in range(layers)}
    open_ = [layer for layer, file in files.items() if kept(file) is None]
    for done, (layer, losses) in enumerate(zip(open_, pool.run(_losses, open_), strict=True), 1):
        write_sealed(files[layer], {"losses": losses})
        progress(layers + 2 * (layers - len(open_) + done), 3 * layers, "one unit at a time")
    found: dict[int, list[float]] = {}
    for layer, file in files.items():
        found |= dict(zip(search.at(layer), read_sealed(file)["losses"], strict=True))
    return [found[place] for place in range(len(search.choices))]


def cost(cfg: ModelConfig, choices: Sequence[Choice], judging: int, fitting: int) -> tuple[Memory, Work, int]:
    """From shapes: memory of a task, work of all tasks, bytes of the spools; of so many tokens that judge and fit.

    A task holds a block, a changed unit beside it, the Hessians of the block with what factoring the largest takes, and
    the states of all its variants.
    """
    layers: dict[int, list[Choice]] = {}
    for choice in choices:
        layers.setdefault(choice.unit.layer, []).append(choice)
    counts = [sum(len(choice.options) for choice in layers.get(n, ())) for n in range(cfg.num_hidden_layers)]
    task, work = 0, []
    for layer, found in layers.items():
        linears = [linear for choice in found for linear in choice.unit.linears]
        weights = sum(choice.unit.weights for choice in found)
        inputs = [group[0].columns for group in by_input(linears)] if fitting else []
        held = weights + max(choice.unit.weights for choice in found) + sum(n * n for n in inputs)
        held += HESSIANS * max((n * n for n in inputs), default=0)
        held += (counts[layer] + 1) * judging * cfg.hidden_size + cfg.vocab_size * cfg.hidden_size
        task = max(task, 4 * held + 4 * CHUNK_ELEMENTS * 4)
        work.append(_work(cfg, found, sum(counts[: layer + 1]), judging, fitting, sum(n * n for n in inputs)))
    logits = 2.0 * sum(counts) * judging * cfg.vocab_size * cfg.hidden_size
    spools = 4 * (judging + fitting) * (cfg.num_hidden_layers + 1) * cfg.hidden_size
    return Memory(0, 0, task), total([Work(logits), *work]), spools


def _work(
    cfg: ModelConfig, found: Sequence[Choice], variants: int, judging: int, fitting: int, hessians: float
) -> Work:
    """Of one block: once for all text, again for statistics, and once for each of the `variants` that reach it."""
    routed = 1.0 if cfg.moe is None else cfg.moe.top_k / cfg.moe.experts
    active = sum(c.unit.weights * (routed if c.unit.linears[0].expert is not None else 1.0) for c in found)
    tokens = judging * (variants + 1) + 2 * fitting
    solved = sum(c.unit.weights * sum(option is not None for option in c.options) for c in found)
    return Work(2.0 * active * tokens + 1.1 * hessians * fitting, 120.0 * cfg.hidden_size * tokens, solved)


def run_original(search: Search, pool: Pool, progress: Callable[[int], None]) -> None:
    """The input of each block, and what leaves the last, into spools; those that are there already stay."""
    search.work.mkdir(parents=True, exist_ok=True)
    for layer in range(-1, search.cfg.num_hidden_layers):
        progress(max(0, layer))
        for text in search.texts:
            if not search.spool(text, layer + 1).is_file():
                list(pool.run(_original, [(text, layer)]))


def joint(search: Search, chosen: Sequence[int], pool: Pool) -> float:
    """The loss with every unit stored as its option of `chosen` says."""
    for layer in range(search.cfg.num_hidden_layers):
        list(pool.run(_joint, [(layer, tuple(chosen))]))
    (loss,) = pool.run(_joint_loss, [None])
    return loss


def _original(search: Search, task: tuple[str, int]) -> None:
    """A task: one block (-1: the embedding) for all windows of a text, from spool to spool."""
    text, layer = task
    if layer >= 0:
        _advance_spool(search, layer, read_block(search, layer), search.spool(text, layer), text)
        return
    tokens, path = search.texts[text], search.spool(text, 0)
    with Spool(path.with_suffix(".tmp"), tokens.numel(), search.row_shape, held=0) as spool:
        embed_into(spool, search.source, search.family, search.cfg, tokens)
        spool.rename(path)


def _losses(search: Search, layer: int) -> list[list[float]]:
    """A task: the losses of the units of one block."""
    block = read_block(search, layer)
    statistics = statistics_of(search, layer, block)
    before = search.read(search.spool("judging", layer))
    places, variants = [], []
    for place in search.at(layer):
        unit, options = search.choices[place]
        for option, quantizer in enumerate(options):
            if quantizer is not None:
                changed = {**block, **quantized(search, unit, quantizer, block, statistics)}
                variants.append(_run(search, layer, changed, before))
                places.append((place, option))
    del statistics, before
    for later in range(layer + 1, search.cfg.num_hidden_layers):
        block = read_block(search, later)
        for number, states in enumerate(variants):
            variants[number] = _run(search, later, block, states)
    losses = dict(zip(places, _divergences(search, variants), strict=True))
    return [[losses.get((p, o), 0.0) for o in range(len(search.choices[p].options))] for p in search.at(layer)]


def _joint(search: Search, task: tuple[int, Sequence[int]]) -> None:
    """A task: block `layer` with all its units as they were chosen, from spool to spool."""
    layer, chosen = task
    block = read_block(search, layer)
    statistics = statistics_of(search, layer, block)
    changed = dict(block)
    for place in search.at(layer):
        quantizer = search.choices[place].options[chosen[place]]
        if quantizer is not None:
            changed |= quantized(search, search.choices[place].unit, quantizer, block, statistics)
    _advance_spool(search, layer, changed, search.spool("joint" if layer else "judging", layer), "joint")


def _joint_loss(search: Search, _: None) -> float:
    states = search.read(search.spool("joint", search.cfg.num_hidden_layers))
    return _divergences(search, [states])[0]


def read_block(search: Search, layer: int) -> dict[str, Tensor]:
    """All tensors of a block, floats in float32."""
    prefix = search.family.prefix(layer) + "."
    return {name: search.source.read(prefix + name) for name in search.family.block_tensors(search.cfg, layer)}


def statistics_of(search: Search, layer: int, block: Tensors) -> dict[str, Statistics]:
    """What the inputs of the block look like in the original, by `Linear.input`; none where none is needed."""
    if not search.needs:
        return {}
    wanted = [linear for place in search.at(layer) for linear in search.choices[place].unit.linears]
    first = {group[0].name: group[0].input for group in by_input(wanted)}
    sums = {source: Accumulator(search.needs) for source in first.values()}

    def look(name: str, x: Tensor) -> None:
        if name in first:
            sums[first[name]].add(x)

    watched = ObservingWeights(ResidentWeights(block), look)
    batches = Batches(search.fitting)
    with search.open(search.spool("fitting", layer), search.fitting) as source:
        for batch in range(len(batches)):
            forward(search, layer, watched, batches.read(source, batch), batches.ids(batch))
    found = {key: total.statistics() for key, total in sums.items()}
    return {key: s if s.tokens >= search.min_tokens else Statistics(s.tokens) for key, s in found.items()}


def quantized(
    search: Search, unit: Unit, quantizer: WeightQuantizer, block: Tensors, statistics: Mapping[str, Statistics]
) -> dict[str, Tensor]:
    """The weights of a unit as they would be loaded, by local name."""
    own = dict.fromkeys(unit.names, quantizer)
    change = LinearChange(search.family, Selection(frozenset(), None, own=own), None, quantizer, search.min_tokens)
    found: dict[str, Tensor] = {}
    for group in by_input(unit.linears):
        pairs = [(linear, block[linear.name + ".weight"]) for linear in group]
        solved = change.solve(unit.layer, pairs, statistics.get(group[0].input, Statistics()))
        for linear, new in zip(group, solved, strict=True):
            assert isinstance(new.stored, Quantized)
            found[linear.name + ".weight"] = new.stored.dequantize()
    return found


def forward(search: Search, layer: int, weights: Weights, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Block `layer` for the states `hidden` (n, length, ...) of `tokens` (n, length)."""
    positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
    return search.family.run_block(search.cfg, layer, weights, hidden, positions, tokens=tokens)


def _run(search: Search, layer: int, block: Tensors, states: Sequence[Tensor]) -> list[Tensor]:
    """Block `layer` for the judging windows, batch by batch."""
    batches, weights = Batches(search.judging), ResidentWeights(block)
    return [forward(search, layer, weights, hidden, batches.ids(i)) for i, hidden in enumerate(states)]


def _advance_spool(search: Search, layer: int, block: Tensors, source: Path, text: str) -> None:
    """Block `layer` for all rows of the spool `source`, into that of the next block's input: whole, or not at all."""
    tokens = search.texts.get(text, search.judging)
    batches, weights, path = Batches(tokens), ResidentWeights(block), search.spool(text, layer + 1)
    temporary = Spool(path.with_suffix(".tmp"), tokens.numel(), search.row_shape, held=0)
    with search.open(source, tokens) as before, temporary as after:
        for batch in range(len(batches)):
            hidden = forward(search, layer, weights, batches.read(before, batch), batches.ids(batch))
            batches.write(after, batch, hidden)
        after.rename(path)


def _divergences(search: Search, variants: Sequence[Sequence[Tensor]]) -> list[float]:
    """The mean KL of each variant from the original, from what leaves its last block, batch by batch."""
    family, cfg = search.family, search.cfg
    top = StreamedWeights(search.source, "")
    head = search.source.read(family.embedding if cfg.tie_word_embeddings else family.head)
    sums = [0.0] * len(variants)
    step = max(1, CHUNK_ELEMENTS // len(head))
    for batch, states in enumerate(search.read(search.spool("judging", cfg.num_hidden_layers))):
        theirs, *ours = (
            family.final_hidden(cfg, top, hidden).flatten(0, 1)
            for hidden in (states, *(variant[batch] for variant in variants))
        )
        for start in range(0, len(theirs), step):
            rows = slice(start, start + step)
            expected = functional.linear(theirs[rows], head).log_softmax(-1)
            shares = expected.exp()
            for number, hidden in enumerate(ours):
                scores = functional.linear(hidden[rows], head).log_softmax(-1)
                sums[number] += float((shares * (expected - scores)).sum(dtype=torch.float64))
    return [total / search.judging.numel() for total in sums]

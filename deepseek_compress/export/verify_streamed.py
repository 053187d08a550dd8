"""The check of `verify` for models that do not fit into memory: file and runtime advance together, block by block.

The tokens are given, nothing is generated. The runtime runs a block with its weights alone in memory (`streaming`), the
file the part of its graph that is the same block (`parts`): first most of the text in one call, then the last `STEPS`
tokens one by one behind the cache. What is asked, and the bounds, are those of `verify`; greedy tokens are judged at
every position.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.evaluation.streamed import cost
from deepseek_compress.export.onnx import hidden_name
from deepseek_compress.export.parts import Parts, Pieces
from deepseek_compress.export.rounding import Blocks, in_blocks, without_rounding
from deepseek_compress.export.verify import (
    CLEAR,
    EXACT,
    SHARE,
    Agreement,
    Floats,
    Tables,
    clear_tokens,
    comparable,
    kl_of,
    modules,
    place_of,
    tables_of,
)  # fmt: skip
from deepseek_compress.generation.backends.graph import Ints
from deepseek_compress.models import Architecture
from deepseek_compress.models.activations import InputScheme, input_scheme
from deepseek_compress.models.config import ModelConfig
from deepseek_compress.planning.costs import Memory
from deepseek_compress.streaming import head
from deepseek_compress.streaming.block_run import PlainRun
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.streaming.loop import Facts, Loop, Progress, Stream, Visit
from deepseek_compress.streaming.predict import advance
from deepseek_compress.workers import Pool, open_pool

STEPS = 4  # tokens that are given one by one
ROWS = 32  # positions whose logits are in memory


class Limits(NamedTuple):
    """Limits of a check. `workers`: processes that share the experts of a block."""

    workers: int = 1
    progress: Progress = lambda done, total, note: None


def verify_streamed(
    path: Path, source: Checkpoint, prompts: Sequence[Sequence[int]], work: Path, limits: Limits, dtype: str
) -> Agreement:
    """Compare the file with the runtime over `prompts`; files go into `work`."""
    graph = onnx.load(str(path), load_external_data=False)
    prompts = comparable(prompts, Architecture.of(source).cfg)
    plain, text = without_rounding(graph), _Text.of(prompts)
    tables = tables_of(graph, source, Architecture.of(source).cfg)
    runs: tuple[PlainRun, ...] = (_runtime(source, work, None),)
    graphs = [graph]
    if plain is not None:
        runs, graphs = (*runs, _runtime(source, work, in_blocks(graph))), [plain, graph]
    with open_pool(runs, limits.workers) as pool:
        ours = [_Runtime(runs, number, tables, pool) for number in range(len(runs))]
        theirs = [
            _File(Parts(each, path.parent, dtype), text, len(runs) + number, runs[0].architecture)
            for number, each in enumerate(graphs)
        ]
        return _compared([*ours, *theirs], text, work, limits.progress, dtype)


def needed(path: Path, source: Checkpoint, prompts: Sequence[Sequence[int]], dtype: str) -> Memory:
    """Memory of a check: a block of the runtime, and after it the same part of the file."""
    graph = onnx.load(str(path), load_external_data=False)
    sides = 1 if without_rounding(graph) is None else 2
    length = max(len(prompt) for prompt in prompts)
    found, _, _ = cost(source.header, len(prompts), length, sides)
    logits = 2 * 4 * sides * sum(map(len, prompts)) * Architecture.of(source).cfg.vocab_size
    return found._replace(alone=logits + max(found.alone, memory(path, source, dtype)), resident=found.resident)


def memory(path: Path, source: Checkpoint, dtype: str) -> int:
    """Bytes that the largest part of the file takes in onnxruntime."""
    parts = Parts(onnx.load(str(path), load_external_data=False), path.parent, dtype)
    names = [hidden_name(layer) for layer in range(Architecture.of(source).cfg.num_hidden_layers + 1)]
    blocks = (parts.memory(gives, reads) for reads, gives in pairwise(names))
    return max(parts.memory(names[0], None), *blocks, parts.head_memory(names[-1]))


class _Text(NamedTuple):
    """tokens int64 (B, S), padded at the right as the loop has them; `lengths` (B,) of what is no padding."""

    tokens: Tensor
    lengths: list[int]

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]]) -> _Text:
        lengths = [len(prompt) for prompt in prompts]
        width = max(lengths)
        return cls(torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts]), lengths)

    @property
    def real(self) -> Tensor:
        """bool (B, S): what is no padding."""
        return torch.arange(self.tokens.shape[1]) < torch.tensor(self.lengths)[:, None]

    def left(self, rows: Tensor) -> Tensor:
        """rows (B, S, ...) with the padding at the left, as a graph's calls have it."""
        width = rows.shape[1]
        return torch.stack([row.roll(width - n, 0) for row, n in zip(rows, self.lengths, strict=True)])

    def right(self, rows: Tensor) -> Tensor:
        """Rotate back."""
        return torch.stack([row.roll(n, 0) for row, n in zip(rows, self.lengths, strict=True)])

    @property
    def pieces(self) -> Pieces:
        """One call for most of the columns, then one each."""
        width = self.tokens.shape[1]
        first = max(1, width - STEPS)
        return [slice(0, first), *(slice(place, place + 1) for place in range(first, width))]


def _runtime(source: Checkpoint, work: Path, blocks: Mapping[str, Blocks] | None) -> PlainRun:
    """Build the model without rounded inputs; with `blocks`, as its scheme says and the file rounds these linears."""
    scheme = None
    if blocks is not None:
        scheme = (input_scheme(source.activations) or InputScheme(None))._replace(own=blocks)
    return PlainRun(Architecture.of(source), work, scheme, exact=True)


@dataclass(frozen=True)
class _Runtime:
    """One of `runs`, with the tables of the file."""

    runs: tuple[PlainRun, ...]
    number: int
    tables: Tables
    pool: Pool

    @property
    def architecture(self) -> Architecture:
        """The model."""
        return self.runs[self.number].architecture

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B, S, *row_shape)."""
        model = self.architecture
        rows = model.source.read(model.embedding, None)[tokens.flatten()].float()
        rows = rows if self.tables.embedding is None else self.tables.embedding(rows)
        return model.embed(rows, torch.arange(len(rows)).view(tokens.shape))

    def visit(self, at: Visit) -> None:
        """Run a block."""
        advance(self.runs, self.number, at, self.pool)

    def logits(self, rows: Tensor) -> Floats:
        """Map the last block's output (n, *row_shape) to logits (n, vocabulary); the head in FP32, piece by piece."""
        run = self.runs[self.number]
        model = run.architecture
        weight = model.source.read(model.head, None)
        rounding = None if run.scheme is None else run.scheme.own.get(modules(model.cfg)[1])
        hidden = model.final_hidden(model.top(), rows[:, None])[:, 0]
        hidden = hidden if rounding is None else rounding(hidden)
        parts = (part.float() for part in torch.split(weight, max(1, head.WEIGHTS // weight.shape[1])))
        rounded = (part if self.tables.head is None else self.tables.head(part) for part in parts)
        found: Floats = torch.cat([functional.linear(hidden, part) for part in rounded], 1).numpy()
        return found


@dataclass(frozen=True)
class _File:
    """The file's graph."""

    parts: Parts
    text: _Text
    number: int
    architecture: Architecture

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.architecture.cfg.num_hidden_layers

    @property
    def _mask(self) -> Ints:
        mask: Ints = self.text.left(self.text.real.long()).numpy()
        return mask

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, S) -> (B, S, hidden)."""
        mask = np.ones(tuple(tokens.shape), np.int64)
        part = self.parts.open(hidden_name(0), None, fold=True)
        return torch.from_numpy(part(tokens.numpy(), mask, None, [slice(0, tokens.shape[1])]))

    def visit(self, at: Visit) -> None:
        """Run a block; all of the text is one batch."""
        part = self.parts.open(hidden_name(at.layer + 1), hidden_name(at.layer))
        shape = self.text.tokens.shape
        rows = at.before[self.number].read(0, self.text.tokens.numel())
        hidden = self.text.left(rows.view(*shape, -1)).numpy()
        given = part(self.text.left(self.text.tokens).numpy(), self._mask, hidden, self.text.pieces)
        after = self.text.right(torch.from_numpy(given)).reshape(-1, *self.architecture.row_shape)
        at.after[self.number].write(0, after)

    def logits(self, rows: Tensor) -> Floats:
        """As the runtime's. Each row is a text of one token: nothing here looks at another."""
        ones = np.ones((ROWS, 1), np.int64)
        given = [(ones[: len(some)], some[:, None].numpy()) for some in torch.split(rows.flatten(1), ROWS)]
        found: Floats = np.concatenate(
            [
                np.concatenate([part(one, one, some, [slice(0, 1)])[:, 0] for one, some in given])
                for part in self.parts.open_head(hidden_name(self.blocks))
            ],
            axis=1,
        )
        return found


_Side = _Runtime | _File


@dataclass(frozen=True)
class _Compared:
    """Runs each block of every side."""

    sides: Sequence[_Side]
    real: Tensor

    @torch.no_grad()
    def visit(self, at: Visit) -> Facts:
        """{"before", "errors": |h - h'| of each side over |h|, h of the first}, of what enters and of what leaves."""
        for side in self.sides:
            side.visit(at)
        return {"before": self._errors(at.before), "errors": self._errors(at.after)}

    def _errors(self, stores: Sequence[HiddenStore]) -> list[float]:
        first, *others = (store.read(0, self.real.numel())[self.real.flatten()].double() for store in stores)
        size = max(float(first.norm()), 1e-30)
        return [0.0, *(float((other - first).norm()) / size for other in others)]


@torch.no_grad()
def _compared(sides: Sequence[_Side], text: _Text, work: Path, progress: Progress, dtype: str) -> Agreement:
    """Run all, and judge."""
    architecture = sides[0].architecture
    streams = tuple(Stream(architecture, f"states-{number}") for number in range(len(sides)))
    loop = Loop(streams, text.tokens, work, "compare", last=True)

    def begin(stream: Stream, store: HiddenStore) -> None:
        store.write(0, sides[streams.index(stream)].embed(text.tokens).reshape(-1, *architecture.row_shape))

    facts = loop.run(_Compared(sides, text.real), progress, begin=begin)
    logits = []
    for side, stream in zip(sides, streams, strict=True):
        with loop.output(stream) as store:
            rows = store.read(0, text.tokens.numel())[text.real.flatten()]
        logits.append(side.logits(rows))
    errors = [facts[0]["before"], *(block["errors"] for block in facts)]
    return _judged(logits, errors, architecture.cfg, dtype)


def _judged(logits: Sequence[Floats], errors: Sequence[Sequence[float]], cfg: ModelConfig, dtype: str) -> Agreement:
    """`logits` (positions, vocabulary), `errors`: of runtime and file, or of each without its rounding and with it."""
    half = len(logits) // 2
    p, q = logits[0], logits[half]
    each = kl_of(p, q)
    kl = float(each[: max(1, int(SHARE * len(each)))].mean())
    steps = clear_tokens([p[:, None]], [q[:, None]], CLEAR[dtype])
    worst = float((np.abs(p - q).max(1) / np.maximum(np.abs(p).max(1), 1e-30)).max())
    expected, other = (float(kl_of(p, found).median()) for found in logits[1::2]) if half > 1 else (None, None)
    found = Agreement(len(p), EXACT[dtype], kl, worst, *steps, other, expected, streamed=True)
    if found.holds:
        return found
    distances = [step[half] if not found.exact else abs(step[-1] - step[1]) for step in errors]
    return replace(found, differs=place_of([0.0, *distances], cfg, not found.exact))

"""The figures of `divergence` for models that do not fit into memory: all of them advance together, block by block.

Everything is teacher-forced: the tokens are given, nothing is generated. Models of the reference's depth run with it;
one of another depth runs by itself, and only what enters the heads is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_compress import machine
from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.compress.forecast import TEXT, calibrated_cost
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.divergence import Divergence, Sample, check, layered
from deepseek_compress.models import Architecture
from deepseek_compress.models.activations import input_scheme
from deepseek_compress.numerics.channel_error import Outliers
from deepseek_compress.numerics.expert_choice import Choices
from deepseek_compress.numerics.kv_cache import KvRounding
from deepseek_compress.planning.costs import Memory, Work, total, useful
from deepseek_compress.streaming import head
from deepseek_compress.streaming.block_run import PlainRun
from deepseek_compress.streaming.head import HeadInput
from deepseek_compress.streaming.hidden_store import RESIDENT
from deepseek_compress.streaming.loop import Facts, Progress
from deepseek_compress.streaming.predict import predictions
from deepseek_compress.workers import open_pool

ROOM = 0.8  # share of the memory that a model in memory may take
WHOLE = 1_500_000_000  # bytes besides its weights: libraries, a batch, its logits


class Subject(NamedTuple):
    """A model and how its keys and values are rounded."""

    checkpoint: Checkpoint
    kv_cache: KvRounding | None = None


class ByLayer(NamedTuple):
    """Differences between a model and the reference after each block; see `streaming.predict`."""

    errors: list[float] | None = None
    choices: list[float | None] | None = None
    outliers: list[Outliers | None] | None = None
    experts: list[Choices | None] | None = None

    @classmethod
    def of(cls, facts: Sequence[Facts], number: int) -> ByLayer:
        """From the facts of all blocks, of the model of that number."""
        keys = ("errors", "choices", "outliers", "experts")
        errors, choices, outliers, experts = ([block[key][number] for block in facts] for key in keys)
        return cls(
            None if None in errors else errors,
            None if all(share is None for share in choices) else choices,
            None if None in outliers else outliers,
            experts if any(experts) else None,
        )


class Limits(NamedTuple):
    """Resource limits of a run; see `stages.base.Context`."""

    memory: int | None = None  # bytes
    workers: int | None = None
    device: str = "cpu"


NO_LIMITS = Limits()


def fits(header: Header, limit: int | None) -> bool:
    """Whether a model can be held in float32 within `limit` bytes, or within this machine's memory."""
    most = room(limit)
    return most is None or 4 * sum(info.elements for info in header.tensors.values()) + WHOLE <= most


def room(limit: int | None) -> int | None:
    """Bytes there are: `limit`, or a share of this machine's memory; None: not known."""
    return limit or int(ROOM * (machine.memory() or 0)) or None


def cost(header: Header, samples: int, length: int, models: int = 2) -> tuple[Memory, Work, Work]:
    """Memory, work here and in workers for `models` of these shapes over `samples` windows of `length` tokens."""
    architecture = Architecture.of(header)
    cfg, tokens = architecture.cfg, samples * length
    blocks = [calibrated_cost(cfg, block.linears, [], samples, length, False) for block in architecture.blocks]
    size = cfg.vocab_size * cfg.hidden_size
    states = 2 * models * min(RESIDENT, 4 * tokens * cfg.hidden_size)
    each = 4 if header.tensors[architecture.head].encoding == "packed" else 2  # see `Architecture.table`
    top = models * (each * size + 4 * min(size, head.WEIGHTS) + 24 * head.LOGITS)
    alone, resident, task = (max(getattr(block, key) for block in blocks) for key in ("alone", "resident", "task"))
    work = total([*(block.work for block in blocks), Work(2.0 * tokens * size, 40.0 * tokens * cfg.vocab_size)])
    here, there = (Work(*(models * value for value in part)) for part in (work, total(b.tasks for b in blocks)))
    return Memory(TEXT + states + max(alone, top), TEXT + states + resident, task), here, there


def measure(
    subjects: Mapping[str, Subject], samples: Sequence[Sample], work: Path, limits: Limits, progress: Progress
) -> dict[str, Divergence]:
    """Measure the divergence of each model from the first over the same samples; `work` lets a run resume."""
    runs = {name: _run(subject, work, limits.device) for name, subject in subjects.items()}
    sizes = [run.architecture.cfg.vocab_size for run in runs.values()]
    for size in sizes:
        check(samples, size, sizes[0])
    depths = [len(run.architecture.blocks) for run in runs.values()]
    tokens, places, following, owner = _tokens(samples)
    found: dict[str, HeadInput] = {}
    by_layer: dict[str, ByLayer] = {}
    with ExitStack() as stack:
        for depth in dict.fromkeys(depths):
            together = [name for name, its in zip(runs, depths, strict=True) if its == depth]
            folder = work / f"depth-{depth}"
            chosen = tuple(replace(runs[name], work=folder) for name in together)
            pool = stack.enter_context(open_pool(chosen, _workers(subjects, tokens, limits)))
            compared = _compared(samples, tokens) if depth == depths[0] else None
            heads, facts = stack.enter_context(predictions(chosen, tokens, places, folder, pool, progress, compared))
            for number, name in enumerate(together):
                found[name] = heads[number]
                by_layer[name] = ByLayer.of(facts, number)
        heads_of = {name: found[name] for name in subjects}
        return _divergences(heads_of, by_layer, samples, following, owner)


def _run(subject: Subject, work: Path, device: str) -> PlainRun:
    scheme = input_scheme(subject.checkpoint.activations)
    return PlainRun(Architecture.of(subject.checkpoint, device), work, scheme, subject.kv_cache, exact=True)


def _workers(subjects: Mapping[str, Subject], tokens: Tensor, limits: Limits) -> int:
    if limits.device != "cpu":
        return 1
    header = next(iter(subjects.values())).checkpoint.header
    memory, _, _ = cost(header, len(tokens), tokens.shape[1], len(subjects))
    size = header.bytes
    return memory.workers(limits.workers, useful(machine.cores(), size), limits.memory)


def _tokens(samples: Sequence[Sample]) -> tuple[Tensor, list[int], Tensor, list[int]]:
    """Tokens padded at the right, the rows that predict, the tokens they predict, and the sample of each."""
    width = max(len(sample.tokens) for sample in samples)
    tokens = torch.tensor([[*sample.tokens, *[0] * (width - len(sample.tokens))] for sample in samples])
    places = [
        index * width + place - 1
        for index, sample in enumerate(samples)
        for place in range(sample.start, len(sample.tokens))
    ]
    owner = [index for index, sample in enumerate(samples) for _ in range(sample.predicted)]
    return tokens, places, tokens.flatten()[torch.tensor(places) + 1], owner


def _compared(samples: Sequence[Sample], tokens: Tensor) -> Tensor:
    """bool (samples, width): the rows whose states are compared after every block; padding is not among them."""
    lengths = torch.tensor([len(sample.tokens) for sample in samples])
    chosen = torch.zeros(len(samples), dtype=torch.bool)
    chosen[list(layered(samples))] = True
    return (torch.arange(tokens.shape[1]) < lengths[:, None]) & chosen[:, None]


def _divergences(
    models: Mapping[str, HeadInput],
    by_layer: Mapping[str, ByLayer],
    samples: Sequence[Sample],
    following: Tensor,
    owner: list[int],
) -> dict[str, Divergence]:
    scores = head.scores(list(models.values()), following)
    counts, index = [sample.predicted for sample in samples], torch.tensor(owner)

    def summed(values: Tensor) -> Tensor:
        return torch.zeros(len(samples), dtype=torch.float64).index_add_(0, index, values.double())

    found = {}
    for number, name in enumerate(models):
        agreed = summed(scores.best[number] == scores.best[0]).long().tolist()
        nll, kl = summed(scores.nll[number]).tolist(), summed(scores.kl[number]).tolist()
        if not all(map(math.isfinite, nll)):
            raise DscError(f"{name}: logits that are NaN or infinite", "check the model: its weights may be damaged")
        apart = by_layer[name] if number else ByLayer()
        found[name] = Divergence(counts, nll, kl, agreed, apart.errors, None, *apart[1:])
    return found

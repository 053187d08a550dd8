"""Text run once through a model as it is, to look at the inputs of its linears before anything changes.

The hidden state lies in a spool; each block's weights are read when they are used. Everything is computed in this
process and in one order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_compress.blocks.calibrated import BATCH_TOKENS, Batches, embedded
from deepseek_compress.blocks.job import Job
from deepseek_compress.blocks.spool import HELD, Spool
from deepseek_compress.checkpoint import Header
from deepseek_compress.costs import Work
from deepseek_compress.models import Family, ModelConfig, Role
from deepseek_compress.models.layers import SCORES_AT_ONCE
from deepseek_compress.models.weights import ObservingWeights, StreamedWeights

Look = Callable[[str, Tensor], None]  # (name of a linear in its block, its input)
Run = Callable[[Look], None]


class Cost(NamedTuple):
    """Of the run over the text."""

    memory: int  # bytes
    work: Work


NOTHING = Cost(0, Work())


def cost(family: Family, cfg: ModelConfig, header: Header, samples: int, length: int) -> Cost:
    """The largest weight decoded, a batch in a block, and the hidden state; two operations a weight and token."""
    tokens, share = samples * length, 1.0 if cfg.moe is None else cfg.moe.top_k / cfg.moe.experts
    sizes = [linear for layer in range(cfg.num_hidden_layers) for linear in family.linears(cfg, layer)]
    active = sum(x.rows * x.columns * (share if x.role is Role.EXPERT else 1.0) for x in sizes)
    largest = max([x.rows * x.columns for x in sizes] + [header.tensors[family.embedding].elements // 2])
    rows = max(x.rows for x in sizes) + 8 * cfg.hidden_size
    held = 4 * min(HELD, 4 * tokens * cfg.hidden_size) + 12 * SCORES_AT_ONCE
    return Cost(8 * largest + 4 * BATCH_TOKENS * _at_once(cfg) * rows + held, Work(2.0 * active * tokens))


def walked(job: Job, tokens: Tensor) -> Iterator[tuple[int, Run]]:
    """For each block its number and what runs it over `tokens` int64 (samples, length), to be called once."""
    job.work.mkdir(parents=True, exist_ok=True)
    hidden, batches = embedded(job, tokens), Batches(tokens)
    batches.step *= _at_once(job.cfg)
    for layer in range(job.cfg.num_hidden_layers):
        yield layer, partial(_run, job, layer, hidden, batches)
    hidden.remove()
    hidden.close()


@torch.no_grad()
def _run(job: Job, layer: int, hidden: Spool, batches: Batches, look: Look) -> None:
    """Run block `layer` over `hidden`, which then holds what it gives."""
    weights = ObservingWeights(StreamedWeights(job.source, job.family.prefix(layer) + "."), look)
    for batch in range(len(batches)):
        x, ids = batches.read(hidden, batch), batches.ids(batch)
        out = job.family.run_block(job.cfg, layer, weights, x, batches.positions(batch), tokens=ids)
        batches.write(hidden, batch, out)


def _at_once(cfg: ModelConfig) -> int:
    """Batches that run together: each time, all experts of a block are read."""
    return 1 if cfg.moe is None else 4

"""What the model makes of each window of a pool of text, block by block: how surprised it is, where its states lie,
which experts it asks. Nothing is changed; memory is that of a calibrated run, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress import machine
from deepseek_compress.blocks.calibrated import Batches, calibrated_block, embedded
from deepseek_compress.blocks.forecast import TEXT, calibrated_cost
from deepseek_compress.blocks.job import Job, Solved
from deepseek_compress.blocks.spool import Spool
from deepseek_compress.calibration.selection import Candidates
from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.costs import Memory, Work, total
from deepseek_compress.models import Family, Linear, ModelConfig
from deepseek_compress.models.moe import Routing
from deepseek_compress.models.weights import StreamedWeights
from deepseek_compress.numerics.types import Statistics
from deepseek_compress.workers import Pool

LOGITS = 1 << 24  # numbers of a piece of the logits: 64 MB
VOCABULARY = 1 << 26  # numbers of the part of the head that is float32 at a time: 256 MB


class Unchanged:
    """A change that changes nothing."""

    needs: frozenset[str] = frozenset()
    min_tokens = 0

    def wants(self, layer: int, linear: Linear) -> bool:
        """No."""
        return False

    def solve(self, layer: int, group: Sequence[tuple[Linear, Tensor]], statistics: Statistics) -> list[Solved]:
        """Never called."""
        raise NotImplementedError


def unchanged(source: Checkpoint, family: Family, cfg: ModelConfig, work: Path) -> Job:
    """A job whose blocks are run as they are; spools lie in `work`."""
    return Job(source, family, cfg, Unchanged(), work)


@torch.no_grad()
def survey(job: Job, tokens: Tensor, pool: Pool, progress: Callable[[int, int, str], None]) -> Candidates:
    """What the model makes of each window of tokens, int64 (n, length)."""
    job.work.mkdir(parents=True, exist_ok=True)
    machine.settle()
    batches, experts = Batches(tokens), []

    def count(routing: Routing) -> None:
        assert job.cfg.moe is not None
        kinds = job.cfg.moe.experts
        window = torch.arange(len(routing.experts)) // tokens.shape[1]
        places = window[:, None] * kinds + routing.experts
        experts.append(torch.bincount(places.flatten(), minlength=len(tokens) * kinds).view(-1, kinds))

    hidden = embedded(job, tokens)
    layers = job.cfg.num_hidden_layers
    for layer in range(layers):
        progress(layer, layers, f"reading the pool, block {layer}")
        following = Spool(job.work / f"pool-{layer % 2}.tmp", hidden.rows, hidden.row_shape)
        calibrated_block(job, layer, hidden, batches, following, lambda name, parts: None, pool, count)
        hidden.remove()
        hidden = following
    entropy, states = _heads(job, hidden, batches)
    hidden.remove()
    progress(layers, layers, "pool read")
    return Candidates(entropy, states, torch.stack(experts, dim=1) if experts else None)


def _heads(job: Job, hidden: Spool, batches: Batches) -> tuple[Tensor, Tensor]:
    """Mean entropy (n,) of the predictions and mean input (n, hidden) of the head, both float64, over each window.

    The vocabulary comes in slices: with m the largest logit so far, z = sum exp(l - m) and e = sum exp(l - m) l,
    the entropy is log z + m - e / z.
    """
    top = StreamedWeights(job.source, "")
    states, final = [], Spool(job.work / "final.tmp", hidden.rows, (job.cfg.hidden_size,))
    for batch in range(len(batches)):
        x = job.family.final_hidden(job.cfg, top, batches.read(hidden, batch)).float()
        batches.write(final, batch, x)
        states.append(x.double().mean(1))
    head = job.source.read(job.family.embedding if job.cfg.tie_word_embeddings else job.family.head, dtype=None)
    largest = torch.full((hidden.rows,), -torch.inf)
    z, e = torch.zeros(hidden.rows), torch.zeros(hidden.rows)
    for part in torch.split(head, max(1, VOCABULARY // head.shape[1])):
        rows, some = part.float(), max(1, LOGITS // len(part))
        for start in range(0, hidden.rows, some):
            chunk = slice(start, min(start + some, hidden.rows))
            logits = functional.linear(final.read(start, chunk.stop - start), rows)
            m = torch.maximum(largest[chunk], logits.amax(1))
            mass = (logits - m[:, None]).exp()
            before = (largest[chunk] - m).exp()
            z[chunk] = z[chunk] * before + mass.sum(1)
            e[chunk] = e[chunk] * before + (mass * logits).sum(1)
            largest[chunk] = m
    final.remove()
    entropy = z.log() + largest - e / z
    return entropy.double().view(batches.samples, -1).mean(1), torch.cat(states)


def cost(family: Family, cfg: ModelConfig, windows: int, length: int) -> tuple[Memory, Work, Work]:
    """What `survey` needs: memory, work here, work in workers."""
    layers = range(cfg.num_hidden_layers)
    blocks = [calibrated_cost(cfg, family.linears(cfg, layer), [], windows, length, False) for layer in layers]
    tokens, size = windows * length, cfg.vocab_size * cfg.hidden_size
    head = 2 * size + 4 * min(size, VOCABULARY) + 12 * LOGITS
    alone, beside, task = (max(getattr(block, key) for block in blocks) for key in ("alone", "beside", "task"))
    works = [*(block.work for block in blocks), Work(2.2 * tokens * size, 20.0 * tokens * cfg.vocab_size)]
    return Memory(TEXT + max(alone, head), TEXT + beside, task), total(works), total(block.tasks for block in blocks)

"""Score each window of a pool of text with the model, block by block: the entropy of its predictions, its hidden
states, the experts it reaches. Nothing is changed; memory is that of a calibrated run, whatever the size of the model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deepseek_compress.calibration.selection import Candidates
from deepseek_compress.compress.forecast import TEXT, calibrated_cost
from deepseek_compress.models import Architecture
from deepseek_compress.models.moe import Routing
from deepseek_compress.planning.costs import Memory, Work, total
from deepseek_compress.streaming import head
from deepseek_compress.streaming.batches import Batches
from deepseek_compress.streaming.block_run import PlainRun
from deepseek_compress.streaming.forward import run_block
from deepseek_compress.streaming.head import HeadInput
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.streaming.loop import Loop, Progress, Stream, Visit
from deepseek_compress.workers import Pool


@torch.no_grad()
def score_windows(run: PlainRun, tokens: Tensor, pool: Pool, progress: Progress) -> Candidates:
    """Score each window of tokens, int64 (n, length); what an interrupted run left in `run.work` is taken up."""
    stream = Stream(run.architecture, "pool")
    loop = Loop((stream,), tokens, run.work, "pool", "reading the pool, block", last=True,
                here=pool.here)  # fmt: skip
    found = loop.run(_Count(run, pool), progress)
    experts = [torch.tensor(block["experts"]) for block in found if "experts" in block]
    with loop.output(stream) as hidden:
        entropy, states = _heads(run, hidden, Batches(tokens, device=run.architecture.device))
    return Candidates(entropy, states, torch.stack(experts, dim=1) if experts else None)


class _Count:
    """Runs each block and counts which experts a window asks."""

    def __init__(self, run: PlainRun, pool: Pool) -> None:
        self.run, self.pool = run, pool

    def visit(self, at: Visit) -> dict[str, Any]:
        """{"experts": tokens of each expert by window}, where there are experts."""
        facts: dict[str, Any] = {}

        def count(routing: Routing) -> None:
            moe = at.blocks[0].moe
            assert moe is not None
            window = torch.arange(len(routing.experts)) // at.batches.length
            places = (window[:, None] * moe.experts + routing.experts).flatten()
            counts = torch.bincount(places, minlength=at.batches.samples * moe.experts)
            facts["experts"] = counts.view(-1, moe.experts).tolist()

        run_block(self.run, at.layer, at.before[0], at.batches, at.after[0], lambda name, parts: None, self.pool, count)
        return facts


def _heads(run: PlainRun, hidden: HiddenStore, batches: Batches) -> tuple[Tensor, Tensor]:
    """Mean entropy (n,) of the predictions and mean input (n, hidden) of the head, both float64, over each window."""
    architecture, top, states = run.architecture, run.architecture.top(), []
    with HiddenStore(run.work / "final.tmp", hidden.rows, (architecture.cfg.hidden_size,)) as final:
        for batch in range(len(batches)):
            x = architecture.final_hidden(top, batches.read(hidden, batch)).float()
            batches.write(final, batch, x)
            states.append(x.double().mean(1).cpu())
        model = HeadInput(final.read, architecture.table(architecture.head, architecture.device))
        entropy = head.entropy(model, final.rows)
    return entropy.double().view(batches.samples, -1).mean(1), torch.cat(states)


def cost(architecture: Architecture, windows: int, length: int) -> tuple[Memory, Work, Work]:
    """Return the costs of `score_windows`: memory, work here, work in workers."""
    cfg = architecture.cfg
    blocks = [calibrated_cost(cfg, block.linears, [], windows, length, False) for block in architecture.blocks]
    tokens, size = windows * length, cfg.vocab_size * cfg.hidden_size
    top = 2 * size + 4 * min(size, head.WEIGHTS) + 48 * head.LOGITS
    alone, resident, task = (max(getattr(block, key) for block in blocks) for key in ("alone", "resident", "task"))
    works = [*(block.work for block in blocks), Work(2.2 * tokens * size, 20.0 * tokens * cfg.vocab_size)]
    return Memory(TEXT + max(alone, top), TEXT + resident, task), total(works), total(block.tasks for block in blocks)

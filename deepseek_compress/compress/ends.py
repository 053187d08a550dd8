"""The two ends of a model that is compressed with text: the embedding before the first block, the head after the last.

Both are made again when an interrupted run goes on, which takes little time, and written unless they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.compress import tables
from deepseek_compress.compress.accumulate import Accumulator
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.models import Role
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Quantized, Statistics
from deepseek_compress.streaming.batches import Batches
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.streaming.loop import Loop, Stream

Store = Callable[[str, Mapping[str, Tensor]], None]


class Ends:
    """Changes of the embedding and of the head in a job."""

    def __init__(self, job: Job, tokens: Tensor, store: Store) -> None:
        self.job, self.tokens, self.store = job, tokens, store
        self.facts: list[dict[str, Any]] = []
        self.embedding: Quantized | None = None
        architecture = job.architecture
        own = architecture.head if not architecture.cfg.tie_word_embeddings else ""
        weights = job.solver.weights if isinstance(job.solver, LinearSolver) else None
        self.head = own if own in job.tables else ""
        self.method = tables.solved(job.tables[own], weights) if self.head else None

    @property
    def last(self) -> bool:
        """Whether the last block's output is needed."""
        return self.method is not None

    def before(self) -> Callable[[Stream, HiddenStore], None] | None:
        """Write the embedding; returns what fills the first store with its rows, None where it does not change."""
        name = self.job.architecture.embedding
        if name not in self.job.tables:
            return None
        self.embedding, fact = rounded(self.job, name)
        self.store(name, tables.stored(self.embedding))
        self.facts.append(fact)
        return self._embed

    def after(self, loop: Loop) -> None:
        """Write the head, solved from what the final norm gives where the method takes that."""
        if not self.head:
            return
        statistics = Statistics() if self.method is None else self._collect(loop)
        if self.method is None or statistics.tokens < self.job.min_tokens:
            found, fact = rounded(self.job, self.head)
        else:
            found, fact = self._solved(self.method, statistics)
        self.store(self.head, tables.stored(found))
        self.facts.append(fact)

    def _solved(self, method: Gptq, statistics: Statistics) -> tuple[Quantized, dict[str, Any]]:
        architecture = self.job.architecture
        table = architecture.source.read(self.head, tables.kept_type(architecture.source, self.head))
        found = tables.solve_rows(table.to(architecture.device), method, statistics)
        return found, tables.facts(self.head, Role.HEAD, table.to(architecture.device), found, method, statistics)

    def _embed(self, stream: Stream, store: HiddenStore) -> None:
        """Fill `store` with the rounded rows; in a paired run the original's samples have the original's."""
        architecture, table = stream.architecture, self.embedding
        assert table is not None
        batches = Batches(self.tokens, self.job.paired)
        original = architecture.table(architecture.embedding) if self.job.paired else None
        for batch in range(len(batches)):
            ids, split = batches.ids(batch), batches.split(batch)
            states = tables.embedded(architecture, table, ids)
            if split is not None and original is not None:
                states[split.theirs] = architecture.embed(original, ids[split.theirs])
            batches.write(store, batch, states)

    def _collect(self, loop: Loop) -> Statistics:
        """Return sums over what the final norm gives."""
        architecture = self.job.architecture
        sums, top = Accumulator(self.job.solver.needs), architecture.top()
        batches = Batches(self.tokens, self.job.paired, device=architecture.device)
        with loop.output(loop.streams[0]) as states:
            for batch in range(len(batches)):
                sums.add(architecture.final_hidden(top, batches.read(states, batch)), batches.split(batch))
        return sums.statistics(self.head)


def rounded(job: Job, name: str) -> tuple[Quantized, dict[str, Any]]:
    """Return a table without statistics, and the facts about it."""
    architecture, how = job.architecture, job.tables[name]
    assert isinstance(how, Rtn)
    table = architecture.source.read(name, tables.kept_type(architecture.source, name))
    found = tables.round_rows(table, how)
    role = Role.EMBEDDING if name == architecture.embedding else Role.HEAD
    return found, tables.facts(name, role, table, found, how, Statistics())


@torch.no_grad()
def rounded_parts(job: Job, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a table without statistics as it is stored, and the facts about it."""
    found, fact = rounded(job, name)
    return tables.stored(found), fact

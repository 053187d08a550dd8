"""The loop around one graph for prefill and decode: mask, positions, and the cache that goes from call to call.

What computes is a runner of two methods, so that onnxruntime and an engine run under the same loop: `empty(batch)`
gives the cache inputs before the first token, `run(feed)` computes one call. Inputs and outputs: see `export.onnx`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from deepseek_compress.errors import DscError
from deepseek_compress.generation.backends import Backend, Floats

Ints = NDArray[np.int64]
CHUNK = 256  # tokens of a call: bounds the logits and the scores of a long prompt


class Runner(Protocol):
    """One graph, loaded."""

    name: str

    def empty(self, batch: int) -> dict[str, Any]:
        """Return the cache inputs before the first token, by name: arrays whose past length is 0."""
        ...

    def run(self, feed: Mapping[str, Any]) -> tuple[Floats, dict[str, Any]]:
        """One call: logits (B, S, vocabulary), and the next call's cache inputs by name."""
        ...


class GraphModel:
    """A graph with its cache carried along, for a batch that may be padded."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.past: dict[str, Any] = {}
        self.mask: Ints = np.zeros((0, 0), np.int64)

    def start(self, batch: int) -> None:
        """Forget everything."""
        self.past = self.runner.empty(batch)
        self.mask = np.zeros((batch, 0), np.int64)

    def step(self, tokens: Ints, mask: Ints | None = None) -> Floats:
        """tokens (B, S) after those seen so far -> logits (B, S, vocabulary). `mask` (B, S): 0 marks padding."""
        new = np.ones_like(tokens) if mask is None else mask
        self.mask = np.concatenate([self.mask, new], axis=1)
        positions = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
        feed = {"input_ids": tokens, "attention_mask": self.mask, "position_ids": positions, **self.past}
        logits, self.past = self.runner.run(feed)
        return logits

    def truncate(self, length: int) -> bool:
        """Keep the first `length` tokens of each row: caches are (..., tokens, channels).

        False, and nothing changes, where a cache holds something else than every token.
        """
        if any(value.shape[-2] != self.mask.shape[1] for value in self.past.values()):
            return False
        self.past = {name: value[..., :length, :] for name, value in self.past.items()}
        self.mask = self.mask[:, :length]
        return True


class GraphBackend(Backend):
    """One text through a graph. `most`: tokens that the cache takes; `chunk`: tokens of a call."""

    def __init__(self, runner: Runner, context: int | None = None, chunk: int = CHUNK) -> None:
        super().__init__()
        self.name = runner.name
        self.model = GraphModel(runner)
        self.context, self.chunk = context, chunk
        self.model.start(1)

    def feed(self, ids: Sequence[int]) -> Floats:
        """Logits (vocabulary,) after `ids`, a chunk at a time."""
        if not ids:
            raise DscError("no tokens to compute", "give a prompt")
        for start in range(0, len(ids), self.chunk):
            logits = self.model.step(np.array([ids[start : start + self.chunk]], np.int64))
        last: Floats = logits[0, -1]
        return last

    def truncate(self, length: int) -> int:
        """Cut the cache, or begin again."""
        if length and self.model.truncate(length):
            return length
        self.model.start(1)
        return 0

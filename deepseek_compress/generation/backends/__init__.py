"""Who computes the next token: one file a runtime, each a `Backend` with `prefill` and `step`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]


class Backend(ABC):
    """Logits of the token that follows one text, which grows; what two texts in turn begin with is computed once."""

    name: str
    context: int | None = None  # tokens it can hold; None: not known

    def __init__(self) -> None:
        self._seen: list[int] = []  # tokens in the cache

    def prefill(self, ids: Sequence[int]) -> Floats:
        """Logits (vocabulary,) after the whole text `ids`, which has at least one token."""
        kept = 0
        while kept < min(len(self._seen), len(ids) - 1) and self._seen[kept] == ids[kept]:
            kept += 1
        if kept < len(self._seen):
            kept = self.truncate(kept)
        return self._add(self._seen[:kept], ids[kept:])

    def step(self, token: int) -> Floats:
        """Logits (vocabulary,) after one more token."""
        return self._add(self._seen, [token])

    def _add(self, before: Sequence[int], new: Sequence[int]) -> Floats:
        try:
            logits = self.feed(new)
        except BaseException:  # stopped in the middle: what the cache holds is not known
            self._seen = []
            self.truncate(0)
            raise
        self._seen = [*before, *new]
        return logits

    @abstractmethod
    def feed(self, ids: Sequence[int]) -> Floats:
        """Logits (vocabulary,) after `ids`, which follow the tokens in the cache."""

    @abstractmethod
    def truncate(self, length: int) -> int:
        """Forget all but the first `length` tokens; returns how many are left, which may be fewer."""

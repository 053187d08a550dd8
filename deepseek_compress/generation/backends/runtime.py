"""A checkpoint in our own runtime, decoded to FP32, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from deepseek_compress.generation.backends import Backend, Floats
from deepseek_compress.models.runtime import Model

LARGEST = 32768  # tokens that the cache has room for: memory is taken where tokens are


class RuntimeBackend(Backend):
    """Weights in memory, and one row's cache."""

    name = "runtime"

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> None:
        super().__init__()
        self.model = Model.load(path, dtype, device=device)
        self.context = min(self.model.cfg.max_position_embeddings or LARGEST, LARGEST)
        self.cache = self.model.cache(self.context)
        self.ids: list[int] = []  # of families without a cache, which compute the whole text again

    @torch.no_grad()
    def feed(self, ids: Sequence[int]) -> Floats:
        """Logits (vocabulary,) after `ids`."""
        cached = self.model.family.cached
        self.ids += ids
        tokens = torch.tensor([list(ids) if cached else self.ids]).to(self.model.head.device)
        found = self.model.forward(tokens, self.cache if cached else None, last_only=True)[0, -1]
        logits: Floats = found.cpu().numpy()
        return logits

    def truncate(self, length: int) -> int:
        """Keep the first tokens; none where the cache holds differences between neighbours, or some tokens alone."""
        how = self.model.kv_cache
        if how is not None and (how.delta or how.window is not None):
            length = 0
        if not length:
            self.cache = self.model.cache(self.context)
        self.cache.length = length
        self.ids = self.ids[:length]
        return length

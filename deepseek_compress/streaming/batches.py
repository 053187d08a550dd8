"""Batches over the rows of a hidden store: whole samples, about `BATCH_TOKENS` tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_compress.models import Block
from deepseek_compress.models.weights import Weights
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.streaming.paired_forward import Split, pairs

BATCH_TOKENS = 2048  # fixed: another batch size has other roundings


class Batches:
    """tokens int64 (samples, length); `paired`: every sample stands there twice, and the two are never parted.

    Batches are read to `device`. `together`: batches that run as one, where each would read all experts of a block.
    `size`: tokens of a batch, `BATCH_TOKENS` by default.
    """

    def __init__(
        self,
        tokens: Tensor,
        paired: bool = False,
        together: int = 1,
        device: torch.device | str = "cpu",
        size: int | None = None,
    ) -> None:
        self.tokens = tokens.to(device)
        self.device = self.tokens.device
        self.paired = paired
        self.samples, self.length = tokens.shape
        self.step = max(1, (size or BATCH_TOKENS) // self.length) * together
        if paired:
            self.step += self.step % 2

    def __len__(self) -> int:
        return -(-self.samples // self.step)

    def read(self, store: HiddenStore, batch: int) -> Tensor:
        """(n, length, *row_shape)."""
        count = len(self.ids(batch))
        rows = store.read(batch * self.step * self.length, count * self.length)
        return rows.view(count, self.length, *store.row_shape).to(self.device, non_blocking=True)

    def write(self, store: HiddenStore, batch: int, values: Tensor) -> None:
        """Store (n, length, *row_shape)."""
        store.write(batch * self.step * self.length, values.reshape(-1, *store.row_shape))

    def ids(self, batch: int) -> Tensor:
        """Token ids (n, length)."""
        return self.tokens[batch * self.step : (batch + 1) * self.step]

    def split(self, batch: int) -> Split | None:
        """Which samples of the batch are the original model's."""
        return pairs(len(self.ids(batch)), self.device) if self.paired else None

    def advance(self, block: Block, weights: Weights, before: HiddenStore, after: HiddenStore) -> None:
        """Run a block for all rows of a store, into another."""
        for batch in range(len(self)):
            self.write(after, batch, block.run(weights, self.read(before, batch), self.ids(batch)))

"""Keys and values of the tokens seen so far, for generation."""

from __future__ import annotations

import torch
from torch import Tensor


class KvCache:
    """Per block, tensors (B, heads, capacity, channels) that grow along their third dimension.

    Memory is taken at the first token of a block, for `capacity` tokens. `length` is advanced by the caller after all
    blocks have seen the new tokens. Not differentiable.
    """

    def __init__(self, num_layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.layers: list[tuple[Tensor, ...]] = [() for _ in range(num_layers)]

    def update(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Append `new`, each (B, heads, T, channels); give back all that is known, each (B, heads, S, channels)."""
        if not self.layers[layer]:
            self.layers[layer] = tuple(x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in new)
        end = self.length + new[0].shape[2]
        for kept, x in zip(self.layers[layer], new, strict=True):
            kept[:, :, self.length : end] = x
        return tuple(kept[:, :, :end] for kept in self.layers[layer])

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, (rows,) whole numbers in rising order."""
        for index, tensors in enumerate(self.layers):
            self.layers[index] = tuple(self._compact(kept, rows) for kept in tensors)

    def _compact(self, kept: Tensor, rows: Tensor) -> Tensor:
        out = torch.empty(len(rows), *kept.shape[1:], dtype=kept.dtype, device=kept.device)
        out[:, :, : self.length] = kept[rows, :, : self.length]
        return out

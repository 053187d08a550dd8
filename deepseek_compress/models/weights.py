"""Where a block's tensors come from: memory, a checkpoint on disk, or either of them watched.

A block runs over `Weights`: `weights[name]` gives a tensor (norms, router, biases) and `weights.linear(name, x)` gives
x W^T + b. Names are local to the block ("self_attn.o_proj"). Training passes a dict of leaf tensors in
`ResidentWeights`; nothing here detaches or copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.checkpoint import Checkpoint


class Weights(Protocol):
    """The tensors of one block."""

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor by its name within the block, "input_layernorm.weight"."""
        ...

    def __contains__(self, name: str) -> bool:
        """Whether the block has this tensor."""
        ...

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows)."""
        ...

    def rows(self, name: str, places: Tensor) -> Tensor:
        """Return the rows `places`, int64 (n,), of a tensor that may be too large for memory: (n, columns)."""
        ...


Rows = Callable[[Tensor], Tensor]  # int64 (n,) -> those rows of a table (n, columns)


class ResidentWeights:
    """Tensors in memory, under `prefix` in the mapping ("model.layers.3.", or "" for local names).

    `tables`: rows of tensors that are not in memory, by the same names.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "", tables: Mapping[str, Rows] = {}) -> None:
        self.tensors = tensors
        self.prefix = prefix
        self.tables = tables

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows)."""
        key = self.prefix + name
        return functional.linear(x, self.tensors[key + ".weight"], self.tensors.get(key + ".bias"))

    def rows(self, name: str, places: Tensor) -> Tensor:
        """Return the rows `places` (n,) of a tensor: (n, columns)."""
        table = self.tables.get(self.prefix + name)
        return self.tensors[self.prefix + name][places] if table is None else table(places)


class StreamedWeights:
    """Tensors read and decoded from `checkpoint` at each access and freed after it; `dtype` is what they compute in."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        prefix: str,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self.checkpoint = checkpoint
        self.prefix = prefix
        self.dtype = dtype
        self.device = device

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint.read(self.prefix + name, self.dtype, self.device)

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.checkpoint.header.tensors

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows)."""
        bias = self[name + ".bias"] if name + ".bias" in self else None  # noqa: SIM401 - no mapping
        return functional.linear(x, self[name + ".weight"], bias)

    def rows(self, name: str, places: Tensor) -> Tensor:
        """Return the rows `places` (n,) of a tensor: (n, columns)."""
        return self.checkpoint.read_rows(self.prefix + name, places, self.dtype, self.device)


class HookedWeights:
    """`inner`, with `hook(name, x)` called for the input of every linear before it is applied."""

    def __init__(self, inner: Weights, hook: Callable[[str, Tensor], None]) -> None:
        self.inner = inner
        self.hook = hook

    def __getitem__(self, name: str) -> Tensor:
        return self.inner[name]

    def __contains__(self, name: str) -> bool:
        return name in self.inner

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows)."""
        self.hook(name, x)
        return self.inner.linear(name, x)

    def rows(self, name: str, places: Tensor) -> Tensor:
        """Return the rows `places` (n,) of a tensor: (n, columns)."""
        return self.inner.rows(name, places)


class QuantizedInputs:
    """`inner`, with the input of each linear in `roundings` rounded by its function (x -> x on its 8-bit grid)."""

    def __init__(self, inner: Weights, roundings: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        self.inner = inner
        self.roundings = roundings

    def __getitem__(self, name: str) -> Tensor:
        return self.inner[name]

    def __contains__(self, name: str) -> bool:
        return name in self.inner

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows)."""
        rounding = self.roundings.get(name)
        return self.inner.linear(name, x if rounding is None else rounding(x))

    def rows(self, name: str, places: Tensor) -> Tensor:
        """Return the rows `places` (n,) of a tensor: (n, columns)."""
        return self.inner.rows(name, places)

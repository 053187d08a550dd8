"""One block while text runs through it: its tensors as long as they are needed, and its parts.

A part is what runs over the same batches with the same few linears: attention, an MLP, one expert. `BlockRun` runs the
block as it is; what solves a block overrides `outputs`, and sees each part's linears before they are freed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from deepseek_compress.models import Block
from deepseek_compress.models.activations import InputScheme
from deepseek_compress.models.architecture import Architecture
from deepseek_compress.models.cache import KvCache
from deepseek_compress.models.config import Linear
from deepseek_compress.models.weights import QuantizedInputs, ResidentWeights, Rows, Weights
from deepseek_compress.numerics.kv_cache import KvRounding
from deepseek_compress.streaming.hidden_store import HiddenStore
from deepseek_compress.streaming.paired_forward import PairedWeights, Split, only_changed

Watch = Callable[[Weights], Weights]
Forward = Callable[[Watch, int], Tensor]  # (watch, batch) -> what a part of the block gives for this batch
Put = Callable[[HiddenStore, int, Tensor], None]
Get = Callable[[HiddenStore, int], Tensor]
Store = Callable[[str, dict[str, Tensor]], None]  # takes a tensor's name in the checkpoint and its stored parts


@dataclass(frozen=True)
class Part:
    """Linears of a block that run together: `forward(watch, batch)` over `watch(weights)`, `batches` times.

    In a paired run `split(batch)` says which rows are the original model's. `last` names the linear whose output the
    part adds to `stream(batch)` (n, length, hidden). Its input, `rows` rows, may be kept: `put(store, batch, x)` writes
    that of a batch into a store at `path`, `get(store, batch)` reads it.
    """

    linears: Sequence[Linear]
    forward: Forward
    batches: int
    rows: int
    path: Path
    put: Put
    get: Get
    split: Callable[[int], Split | None] = lambda batch: None
    last: str = ""
    stream: Callable[[int], Tensor] | None = None


class Run(Protocol):
    """A forward pass over blocks, in plain values: any process can do a part of it."""

    @property
    def architecture(self) -> Architecture:
        """The model."""
        ...

    @property
    def work(self) -> Path:
        """Directory for hidden stores."""
        ...

    @property
    def paired(self) -> bool:
        """Whether every sample stands there twice, see `paired_forward`."""
        ...

    @property
    def min_tokens(self) -> int:
        """Experts that fewer tokens reach are reported."""
        ...

    def begin(self, layer: int, store: Store) -> BlockRun:
        """Take up a block; new weights go to `store`."""
        ...


@dataclass(frozen=True)
class PlainRun:
    """A model run as it is, with the roundings of its schemes."""

    architecture: Architecture
    work: Path
    scheme: InputScheme | None = None  # how inputs of linears are rounded
    kv_cache: KvRounding | None = None  # how attention finds keys and values
    exact: bool = False  # weights with their full precision, not as a 16-bit output would store them
    paired: bool = False
    min_tokens: int = 0

    def at(self, device: str) -> PlainRun:
        """Return the same run on another device."""
        return replace(self, architecture=self.architecture.at(device))

    def begin(self, layer: int, store: Store) -> BlockRun:
        """Take up a block."""
        int8 = self.scheme is not None and self.scheme.attention
        return BlockRun(self.architecture.blocks[layer], store, self.scheme, self.kv_cache, int8, self.exact)


class BlockRun:
    """The tensors of one block while they are needed, by local name, in float32."""

    def __init__(
        self,
        block: Block,
        store: Store,
        scheme: InputScheme | None = None,
        kv_cache: KvRounding | None = None,
        int8: bool = False,
        exact: bool = False,
    ) -> None:
        self.block, self.store = block, store
        self.tensors: dict[str, Tensor] = {}  # with the values that the output will load
        self.original: dict[str, Tensor] = {}  # the linears among them as they were, in a paired run
        self.facts: list[dict[str, Any]] = []
        self._roundings = {} if scheme is None else scheme.roundings(block)
        self._cache, self._exact = (kv_cache, int8), exact

    def weights(self, watch: Watch = lambda weights: weights, split: Split | None = None) -> Weights:
        """Return the tensors as the finished model would use them; `watch` sees the inputs as the linears do.

        With `split`, the rows of the original model meet the original linears and are not rounded.
        """
        watched = watch(self.unrounded(split))
        found = self._roundings
        if split is not None:
            found = {name: only_changed(rounding, split) for name, rounding in found.items()}
        return QuantizedInputs(watched, found) if found else watched

    def unrounded(self, split: Split | None = None) -> Weights:
        """Return the same tensors, for inputs that are rounded already."""
        weights = ResidentWeights(self.tensors, tables=self.tables())
        return weights if split is None else PairedWeights(weights, ResidentWeights(self.original), split)

    def tables(self) -> Mapping[str, Rows]:
        """Return functions that gather rows of tables that are too large for memory, by local name."""
        return self.block.tables()

    def cache(self) -> KvCache | None:
        """Return what attention reads keys and values through; None where it reads them as they are."""
        rounding, int8 = self._cache
        if rounding is None and not int8:
            return None
        return KvCache(self.block.cfg.num_hidden_layers, None, rounding, int8)

    def load(self, linears: Iterable[Linear]) -> None:
        """Read weights and biases as they will be stored."""
        for linear in linears:
            self.read(linear.name + ".weight")
            if linear.name + ".bias" in self.block.tensors:
                self.read(linear.name + ".bias")

    def load_others(self) -> None:
        """Read what belongs to no linear: norms, the router."""
        linears = {linear.name + suffix for linear in self.block.linears for suffix in (".weight", ".bias")}
        for name in self.block.tensors:
            if name not in linears and name not in self.block.family.gathered:
                self.read(name)

    def read(self, name: str, exact: bool = False) -> None:
        """Read one tensor into memory."""
        # What stays 16-bit is written in BF16 where the source has FP8, and the next block must see that value
        tensor = self.block.read(name, torch.float32 if exact or self._exact else None)
        self.tensors[name] = tensor.float() if tensor.is_floating_point() else tensor

    def free(self, linears: Iterable[Linear]) -> None:
        """Forget weights that are no longer needed."""
        for linear in linears:
            for tensors in (self.tensors, self.original):
                tensors.pop(linear.name + ".weight", None)
                tensors.pop(linear.name + ".bias", None)

    def outputs(self, part: Part) -> Iterator[tuple[int, Tensor, bool]]:
        """Run a part: (batch, what it computes, whether that is the output of its last linear alone)."""
        self.load(part.linears)
        for batch in range(part.batches):
            yield batch, part.forward(lambda weights: weights, batch), False
        self.free(part.linears)

    def outputs_of(self, others: Sequence[tuple[BlockRun, Part]]) -> Iterator[tuple[int, Iterator[tuple[int, Tensor]]]]:
        """Run parts of one shape, each in a run of its own: (which of them, its (batch, what it computes))."""
        for number, (run, part) in enumerate(others):
            yield number, ((batch, out) for batch, out, _ in run.outputs(part))

    def act(self, part: Part) -> None:
        """Do what is done to a part whose output nobody needs: here nothing."""

    def act_on(self, others: Sequence[tuple[BlockRun, Part]]) -> None:
        """Act on parts of one shape, each in a run of its own."""

    def acts(self, linears: Sequence[Linear]) -> bool:
        """Whether anything is done to these linears, so that they must be visited even where no output is needed."""
        return False

"""This model, on this disk, block by block.

`Architecture.of(checkpoint)` knows what `config.json` says, which tensors belong to which block, and how each runs;
`.blocks[i]` reads the tensors of one block and runs them. Nothing is held: who iterates decides what stays in memory.
Of a header alone it knows shapes, which is what planning needs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.ahead import Ahead
from deepseek_compress.errors import DscError
from deepseek_compress.models.cache import KvCache
from deepseek_compress.models.config import Linear, ModelConfig, Moe, Role
from deepseek_compress.models.families.table import family_of
from deepseek_compress.models.family import Family, Shape
from deepseek_compress.models.rope import places
from deepseek_compress.models.weights import Rows, StreamedWeights, Weights

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Architecture:
    """`family` is a table of facts, `cfg` the typed config.json. `checkpoint` is None where only a header is known."""

    header: Header
    family: Family
    cfg: ModelConfig
    checkpoint: Checkpoint | None = None
    device: torch.device = CPU  # where tensors are read to, and blocks run

    @classmethod
    def of(cls, model: Checkpoint | Header, device: torch.device | str = CPU) -> Architecture:
        """Read the configuration. Raises DscError for one that is not understood."""
        header = model.header if isinstance(model, Checkpoint) else model
        family = family_of(header.config)
        checkpoint = model if isinstance(model, Checkpoint) else None
        cfg = family.located(family.parse(header.config), header.path)
        return cls(header, family, cfg, checkpoint, torch.device(device))

    @property
    def source(self) -> Checkpoint:
        """The checkpoint; raises ValueError where only shapes are known."""
        if self.checkpoint is None:
            raise ValueError(f"{self.header.path}: only its header is known")
        return self.checkpoint

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The decoder blocks in their order."""
        return tuple(Block(self, layer) for layer in range(self.cfg.num_hidden_layers))

    def problems(self) -> list[DscError]:
        """List every missing, unknown and misshaped tensor of the checkpoint."""
        return self.family.problems(self.header)

    @cached_property
    def tensors(self) -> dict[str, Shape]:
        """Every tensor of a complete checkpoint with its shape, those of MTP blocks included."""
        return {**self.family.tensors(self.cfg), **self.mtp}

    @cached_property
    def mtp(self) -> dict[str, Shape]:
        """The tensors of multi-token prediction blocks."""
        return {**self.family.mtp_tensors(self.cfg), **self.family.drafts(self.header)}

    @cached_property
    def vision(self) -> dict[str, Shape]:
        """The tensors that only images need."""
        return self.family.vision_tensors(self.cfg)

    @property
    def has_vision(self) -> bool:
        """Whether the checkpoint holds them."""
        return any(name in self.header.tensors for name in self.vision)

    @cached_property
    def reading(self) -> Reading:
        """Read-ahead of this model's blocks, on a GPU while the block loop runs."""
        return Reading()

    @property
    def has_mtp(self) -> bool:
        """Whether the checkpoint holds MTP blocks."""
        return any(name in self.header.tensors for name in self.mtp)

    @property
    def embedding(self) -> str:
        """The tensor that embeds tokens."""
        return self.cfg.names.embedding

    @property
    def head(self) -> str:
        """The tensor that makes logits: the embedding where the two are tied."""
        return self.embedding if self.cfg.tie_word_embeddings else self.cfg.names.head

    def table(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Read the embedding or the head in its stored type: float32 takes twice the memory, which a packed one, whose
        values need more than 16 bits, is worth."""
        packed = self.header.tensors[name].encoding == "packed"
        return self.source.read(name, torch.float32 if packed else None, device)

    @cached_property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a token's hidden state between blocks: (hidden,), or (streams, hidden)."""
        probe = self.family.embed(self.cfg, torch.empty(1, self.cfg.hidden_size), torch.zeros(1, 1, dtype=torch.long))
        return tuple(probe.shape[2:])

    def embed(self, table: Tensor, tokens: Tensor) -> Tensor:
        """tokens (B, T), table (vocab, hidden) -> the first block's input, float32 (B, T, *row_shape)."""
        return self.family.embed(self.cfg, table, tokens).float()

    def final_hidden(self, weights: Weights, hidden: Tensor) -> Tensor:
        """Map the last block's output (B, T, *row_shape) to the head's input (B, T, hidden)."""
        return self.family.final_hidden(self.cfg, weights, hidden)

    def top(self) -> Weights:
        """Tensors outside blocks, by checkpoint name, read at each access."""
        return StreamedWeights(self.source, "", device=self.device)

    def linears(self, roles: Collection[Role]) -> Iterator[tuple[str, Linear]]:
        """(name in the checkpoint, linear) of every linear of `roles`, block by block."""
        for block in self.blocks:
            for linear in block.linears:
                if linear.role in roles:
                    yield block.prefix + linear.name, linear

    def on(self, source: Checkpoint) -> Architecture:
        """Return this model with the tensors of `source`, whose configuration a transform may have changed."""
        return replace(Architecture.of(source, self.device), family=self.family)

    def at(self, device: torch.device | str) -> Architecture:
        """Return the same model on another device."""
        return replace(self, device=torch.device(device))

    def __reduce__(self) -> tuple[Any, ...]:
        return Architecture, (
            self.header,
            self.family,
            self.cfg,
            self.checkpoint,
            self.device,
        )  # without what is cached


class Reading:
    """Tensors that are read ahead, or none."""

    def __init__(self) -> None:
        self._ahead: Ahead | None = None

    def take(self, name: str) -> dict[str, Tensor] | None:
        """See `Ahead.take`."""
        return None if self._ahead is None else self._ahead.take(name)

    @contextmanager
    def of(self, architecture: Architecture, blocks: Sequence[Block], experts: bool) -> Iterator[None]:
        """Inside, the tensors of `blocks` are read ahead in the order in which they run, on a GPU.

        experts: those of routed experts too; else other processes read them.
        """
        if architecture.device.type == "cpu" or type(architecture.checkpoint) is not Checkpoint or self._ahead:
            yield
            return
        names = [name for block in blocks for name in block.in_order(experts)]
        try:
            with Ahead(architecture.source, names, architecture.device) as self._ahead:
                yield
        finally:
            self._ahead = None


class Block:
    """One decoder block: its tensors by local name ("self_attn.o_proj.weight"), and how it runs on given weights."""

    def __init__(self, architecture: Architecture, layer: int) -> None:
        self.architecture = architecture
        self.family, self.cfg, self.layer = architecture.family, architecture.cfg, layer
        self.prefix = f"{self.family.prefix(layer)}."  # "model.layers.3."

    @cached_property
    def linears(self) -> list[Linear]:
        """The linears a recipe may change, in the order in which they run."""
        return self.family.linears(self.cfg, self.layer)

    @cached_property
    def tensors(self) -> Mapping[str, Shape]:
        """All tensors with their shapes, by local name."""
        return self.family.block_tensors(self.cfg, self.layer)

    @property
    def moe(self) -> Moe | None:
        """Routing of the block; None for a dense block."""
        return self.cfg.moe if self.cfg.is_moe(self.layer) else None

    def in_order(self, experts: bool) -> list[str]:
        """Full names of the tensors as the block loop reads them: what belongs to no linear, attention, routed
        `experts`, the rest."""
        first = (Role.ATTENTION, Role.INDEXER)
        kinds: list[list[str]] = [[], [], []]
        for linear in self.linears:
            kind = 0 if linear.role in first else 1 if linear.expert is not None else 2
            names = (f"{linear.name}.weight", f"{linear.name}.bias")
            kinds[kind] += [name for name in names if name in self.tensors]
        linears = {name for kind in kinds for name in kind}
        others = [name for name in self.tensors if name not in linears and name not in self.family.gathered]
        ordered = [*others, *kinds[0], *(kinds[1] if experts else ()), *kinds[2]]
        return [self.prefix + name for name in ordered]

    def read(self, name: str, dtype: torch.dtype | None = torch.float32) -> Tensor:
        """Read one tensor by its local name, decoded to `dtype`; None: to the type it is stored in."""
        source, full = self.architecture.source, self.prefix + name
        parts = self.architecture.reading.take(full)
        if parts is not None:
            return source.decoded(full, parts, dtype)
        return source.read(full, dtype, self.architecture.device)

    def resident(self) -> dict[str, Tensor]:
        """Read all tensors, floats in float32, by local name; not the tables whose rows are gathered."""
        return {name: self.read(name) for name in self.tensors if name not in self.family.gathered}

    def tables(self) -> dict[str, Rows]:
        """Return functions that gather rows of those tables, float32, by local name."""
        source, device = self.architecture.checkpoint, self.architecture.device
        if source is None:
            return {}
        return {
            name: partial(source.read_rows, self.prefix + name, dtype=torch.float32, device=device)
            for name in self.tensors
            if name in self.family.gathered
        }

    def weights(self) -> Weights:
        """Tensors read and decoded at each access, and freed after it."""
        return StreamedWeights(self.architecture.source, self.prefix, device=self.architecture.device)

    def attention_part(self, weights: Weights, hidden: Tensor, positions: Tensor, cache: KvCache | None) -> Tensor:
        """hidden (B, T, *row_shape) -> hidden with what attention adds."""
        return self.family.attention_part(self.cfg, self.layer, weights, hidden, positions, None, cache)

    def ffn_input(self, weights: Weights, hidden: Tensor) -> Tensor:
        """hidden after attention -> the input of the MLP or the experts (B, T, hidden)."""
        return self.family.ffn_input(self.cfg, self.layer, weights, hidden)

    def ffn_output(self, weights: Weights, hidden: Tensor, added: Tensor) -> Tensor:
        """hidden after attention, and what the MLP or the experts add -> the block's output."""
        return self.family.ffn_output(self.cfg, self.layer, weights, hidden, added)

    def run(self, weights: Weights, hidden: Tensor, tokens: Tensor) -> Tensor:
        """Run the whole block for hidden (B, T, *row_shape) of tokens (B, T), every sample from position 0."""
        positions = places(len(tokens), 0, tokens.shape[1], tokens.device)
        return self.family.run_block(self.cfg, self.layer, weights, hidden, positions, tokens=tokens)

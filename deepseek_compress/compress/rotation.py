"""Rotations folded into the weights: the model computes the same with channels that no longer stand out.

Each norm's weight first goes into the linears that read it (then norms commute with rotations). The residual stream is
rotated by R1: the embedding and whatever adds to the stream give h R1, whatever reads it takes R1 back (QuaRot, arXiv
2404.00456, section 4). The values of every head are rotated by R2 and o_proj takes it back (SpinQuant's R2). No data is
needed, and a tensor is rotated when it is read. A head that is tied to the embedding becomes a tensor of its own, since
the last norm goes into it alone.

Left out: rotations within the MLP and of rotated keys, which would be computed while the model runs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.transformed import Change, transformed
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.selection import packed_problems
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.models.folds import Fold, folds
from deepseek_compress.numerics.rotation import Hadamard, Rotation


@dataclass(frozen=True)
class Turn:
    """Rotation of a weight (rows, columns) or a bias (rows,): R1 on either side, R2 head by head."""

    gain: Tensor | None = None  # (columns,): weight of the norm before it
    reads: Rotation | None = None  # R1 of the stream that its columns read
    adds: Rotation | None = None  # R1 of the stream that its rows add to
    values: Rotation | None = None  # R2
    made: Tensor | None = None  # int64: rows that make values, head by head; None: its columns read values

    def __call__(self, tensor: Tensor) -> Tensor:
        """float32, the same shape."""
        if self.gain is not None:
            tensor = tensor * self.gain
        if self.reads is not None:
            tensor = self.reads(tensor)
        if self.values is not None and self.made is not None:
            heads = (-1, self.values.size, *tensor.shape[1:])
            mine = tensor[self.made].view(heads)
            mixed = self.values(mine) if tensor.dim() == 1 else self.values.rows(mine)
            tensor = tensor.index_copy(0, self.made, mixed.reshape(-1, *tensor.shape[1:]))
        elif self.values is not None:
            tensor = self.values(tensor.view(len(tensor), -1, self.values.size)).view(tensor.shape)
        return tensor if self.adds is None else self.adds.rows(tensor)


@dataclass(frozen=True)
class Ones:
    """A norm whose weight went into what reads it."""

    def __call__(self, tensor: Tensor) -> Tensor:
        """(channels,)."""
        return torch.ones_like(tensor)


def problems(architecture: Architecture, mtp_kept: bool) -> list[DscError]:
    """List why the model cannot be rotated."""
    if architecture.cfg.compressed is not None:
        return [
            DscError(
                f"rotation: {architecture.cfg.model_type} mixes its streams before each norm", "set rotation: null"
            )
        ]
    if mtp_kept and architecture.has_mtp:
        return [DscError("rotation: the MTP block reads the residual stream", "set mtp: drop")]
    return packed_problems(architecture.header, "rotation")


def rotated_header(architecture: Architecture) -> Header:
    """Return the result's header: with a head of its own."""
    header, names = architecture.header, architecture.cfg.names
    if not architecture.cfg.tie_word_embeddings:
        return header
    head = replace(header.tensors[names.embedding], name=names.head)
    config = {**header.config, "tie_word_embeddings": False}
    return replace(header, config=config, tensors={**header.tensors, names.head: head})


def cost(header: Header) -> int:
    """Bytes that turning the largest tensor takes: read, rotated, and rounded."""
    return 10 * max(info.elements for info in header.tensors.values())


def rotate(job: Job, how: Hadamard) -> Job:
    """`job` on the rotated source."""
    return replace(job, architecture=job.architecture.on(rotated(job.architecture, how)))


def rotated(architecture: Architecture, how: Hadamard) -> Checkpoint:
    """Return the checkpoint, rotated."""
    source, cfg, names = architecture.source, architecture.cfg, architecture.cfg.names
    stream = Rotation(cfg.hidden_size, how.seed)
    values = Rotation(cfg.head_dim if cfg.mla is None else cfg.mla.value, how.seed + 1)
    gain = source.read(names.norm)
    changes: dict[str, Change] = {
        names.embedding: Turn(reads=stream),
        names.norm: Ones(),
        names.head: Turn(gain=gain, reads=stream),
    }
    for block in architecture.blocks:
        prefix, turns = block.prefix, dict[str, Turn]()
        for fold in folds(block):
            norm = f"{prefix}{fold.producer}.weight"
            if fold.producer in (names.attention_norm, names.ffn_norm):
                changes[norm] = Ones()
                _reading(fold, Turn(gain=source.read(norm), reads=stream), turns)
            elif fold.rows is not None:
                known = turns.get(fold.producer, Turn())
                turns[fold.producer] = replace(known, values=values, made=torch.unique(fold.rows))
                turns[fold.linears[0]] = Turn(values=values, adds=stream)
            elif fold.producer.endswith(names.ffn.up):
                turns[fold.linears[0]] = Turn(adds=stream)
        for name, turn in turns.items():
            changes[f"{prefix}{name}.weight"] = turn
            if f"{prefix}{name}.bias" in source.header.tensors and (turn.adds or turn.made is not None):
                values_too = turn.values if turn.made is not None else None
                changes[f"{prefix}{name}.bias"] = Turn(adds=turn.adds, values=values_too, made=turn.made)
    origins = {names.head: names.embedding} if cfg.tie_word_embeddings else {}
    return transformed(source, changes, rotated_header(architecture), origins)


def _reading(fold: Fold, turn: Turn, turns: dict[str, Turn]) -> None:
    for name in (*fold.linears, *([fold.router] if fold.router else [])):
        turns[name] = turn

"""Embedding and head in few bits: in a small model they are half of the file that 4-bit blocks leave.

A head is a linear like any other: where the recipe's weights are solved from a Hessian, so is it, from the Hessian of
what the final norm gives, which the block loop keeps. An embedding multiplies nothing, so its rows are rounded to
nearest, and a table that is both (tied) is stored once, rounded like that: its codes must be there before the first
block runs. The loop embeds with the rounded rows, so that every linear sees the inputs it will get.

Tables are solved some rows at a time: rows do not meet, and a vocabulary of 129,280 in float32 would be the largest
thing in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.checkpoint.formats.packed import pack_weight
from deepseek_compress.compress.selection import packed_problems
from deepseek_compress.compress.solver import measure, packed_bits
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture, Role
from deepseek_compress.numerics.gptaq import Gptaq
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.grid import fit_group_size
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Quantized, Statistics, WeightQuantizer

PIECE = 1 << 25  # weights that are solved at a time
Tables = Mapping[str, Rtn]  # name of a table that changes -> how it is rounded without statistics


class Embedding(BaseModel, frozen=True, extra="forbid"):
    """Scheme of the embedding; a tied head is the same table. 8 bits are symmetric, as llama.cpp's Q8_0 is."""

    num_bits: Literal[4, 8] = 8
    group_size: int | None = Field(None, gt=0)  # None: the largest of 128, 64, 32 that divides the hidden size

    def rounding(self, columns: int) -> Rtn:
        """Round to nearest with these knobs for rows of `columns`."""
        size = fit_group_size(columns, self.group_size)
        return Rtn(num_bits=self.num_bits, group_size=size, symmetric=self.num_bits == 8)


class Head(Embedding, frozen=True):
    """Scheme of an untied head: 8 bits, symmetric, the form for which servers have kernels."""

    num_bits: Literal[8] = 8


def changed(architecture: Architecture, embedding: Embedding | None, head: Head | None) -> dict[str, Rtn]:
    """Return the tables that change, by name."""
    cfg, found = architecture.cfg, dict[str, Rtn]()
    if embedding is not None:
        found[architecture.embedding] = embedding.rounding(cfg.hidden_size)
    if head is not None and not cfg.tie_word_embeddings:
        found[architecture.head] = head.rounding(cfg.hidden_size)
    return found


def problems(architecture: Architecture, embedding: Embedding | None, head: Head | None) -> Iterator[DscError]:
    """Group sizes that do not divide the hidden size, and a checkpoint that is packed already."""
    for what, wanted in (("embedding", embedding), ("head", head)):
        if wanted is not None and wanted.group_size and architecture.cfg.hidden_size % wanted.group_size:
            columns = architecture.cfg.hidden_size
            yield DscError(
                f"{what}: {columns} columns do not divide into groups of {wanted.group_size}", "leave it out"
            )
            return
    if embedding is not None or head is not None:
        yield from packed_problems(architecture.header, "embedding" if head is None else "head")


def decisions(tied: bool, embedding: Embedding | None, head: Head | None) -> list[str]:
    """Say what is stored how, and who reads it, one line each; `tied`: embedding and head are one table."""
    lines = []
    if embedding is not None:
        table = "embedding and head, which are one table" if tied else "embedding"
        lines.append(
            f"{table}: {embedding.num_bits} bits; read by dsc and, exported as GGUF, by llama.cpp; not by "
            "transformers, SGLang, or vLLM for most models"
        )
    if head is not None and tied and embedding is None:
        lines.append("head: tied to the embedding, which stays 16-bit (embedding: {num_bits: 8} changes both)")
    elif head is not None and not tied:
        lines.append(f"head: {head.num_bits} bits; read by vLLM from March 2026 on and SGLang")
    return lines


def solved(rounding: WeightQuantizer, weights: WeightQuantizer | None) -> Gptq | None:
    """Return the solver of a head with a Hessian: the recipe's `weights` on its own grid; None: rounded to nearest."""
    if not isinstance(weights, Gptq):
        return None
    grid = rounding.model_dump(include={"num_bits", "group_size", "symmetric"})
    return weights.model_copy(update=grid)


def round_rows(table: Tensor, how: Rtn) -> Quantized:
    """Return the table (rows, columns) rounded to nearest."""
    return _by_rows(table, lambda rows: how(rows, Statistics()))


def solve_rows(table: Tensor, how: Gptq, statistics: Statistics) -> Quantized:
    """Return the table (rows, columns) solved from the statistics of its input."""
    prepared = how.prepare(statistics)
    return _by_rows(table, lambda rows: how.decided(rows, prepared)(rows, prepared))


def stored(found: Quantized) -> dict[str, Tensor]:
    """Return the parts as they lie in a checkpoint: always packed, since inputs of a table are never rounded."""
    return {suffix: part.cpu() for suffix, part in pack_weight(found).items()}


def facts(
    name: str, role: Role, table: Tensor, found: Quantized, method: WeightQuantizer, statistics: Statistics
) -> dict[str, Any]:
    """Return what there is to say about a table, as about a linear."""
    rows = slice(0, max(1, PIECE // table.shape[1]))
    few = Quantized(found.codes[rows], found.scale[rows], found.zero_point[rows], found.num_bits, found.symmetric)
    kind = "gptq" if type(method) is Gptaq and not method.strength else type(method).__name__.lower()
    about = {"name": name.removesuffix(".weight"), "role": str(role), "method": kind, "tokens": statistics.tokens}
    measured = measure(table[rows].float(), few, statistics)
    size = packed_bits(found.num_bits, found.group_size, found.symmetric)
    return {**about, "fallback": False, **measured, "bits": size, "weights": found.codes.numel()}


def embedded(architecture: Architecture, table: Quantized, tokens: Tensor) -> Tensor:
    """tokens (B, T) -> the first block's input from the rounded rows of the tokens alone."""
    places, ids = torch.unique(tokens, return_inverse=True)
    places = places.to(table.codes.device)
    parts = (table.codes[places], table.scale[places], table.zero_point[places])
    rows = Quantized(*parts, table.num_bits, table.symmetric).dequantize()
    return architecture.embed(rows.to(tokens.device), ids)


def _by_rows(table: Tensor, solve: Callable[[Tensor], Quantized]) -> Quantized:
    step = max(1, PIECE // table.shape[1])
    found = [solve(table[start : start + step].float()) for start in range(0, len(table), step)]
    codes, scale, zero_point = (torch.cat(parts) for parts in zip(*(part[:3] for part in found), strict=True))
    return Quantized(codes, scale, zero_point, found[0].num_bits, found[0].symmetric)


def kept_type(source: Checkpoint, name: str) -> torch.dtype | None:
    """Return the type a table is read in: its own where it is plain, since float32 takes twice the memory."""
    return None if source.header.tensors[name].encoding in ("plain", "transformed") else torch.float32

"""Where a scale of channels can move through a block without changing what it computes.

A norm multiplies each channel by its weight, and a linear gives each channel by a row: what divides these can multiply
the columns of every linear that reads the channels. In `down(silu(gate(x)) * up(x))` the rows of `up` are such a
place, in attention the rows that make values. The router reads the same channels as the experts and takes part.

Left out: DeepSeek-V4, whose streams are mixed by the norms' inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_compress.models.architecture import Block
from deepseek_compress.models.config import ModelConfig


class Fold(NamedTuple):
    """Channels, who makes them and who reads them. Names are modules of the block: "mlp.up_proj"."""

    producer: str  # a norm or a linear
    linears: tuple[str, ...]  # that read the channels: the columns of each are channels
    router: str | None = None  # that reads them too
    rows: Tensor | None = None  # int64 (columns,): row of the producer that makes each column; None: in order


def folds(block: Block) -> list[Fold]:
    """List every place of a block, in the order in which its channels are made."""
    cfg, names = block.cfg, block.cfg.names
    if cfg.compressed is not None:
        return []
    readers: dict[str, tuple[str, ...]] = {}
    for linear in block.linears:
        readers[linear.input] = (*readers.get(linear.input, ()), linear.name)
    source = f"{names.attention}.in"
    found = [Fold(names.attention_norm, readers[source])]
    if cfg.mla is not None:
        if cfg.mla.q_lora_rank is not None:
            found.append(Fold(names.q_a_norm, readers[names.q_b]))
        found.append(Fold(names.kv_a_norm, readers[names.kv_b]))
    found.append(Fold(names.v if cfg.mla is None else names.kv_b, (names.o,), rows=_value_rows(cfg)))
    normed = {key: read for key, read in readers.items() if key.endswith(".in") and key != source}
    router = block.moe.names.router.removesuffix(".weight") if block.moe else None
    found.append(Fold(names.ffn_norm, tuple(name for read in normed.values() for name in read), router))
    found += [Fold(read[1], readers[f"{key.removesuffix('.in')}.{names.ffn.down}"]) for key, read in normed.items()]
    return found


def _value_rows(cfg: ModelConfig) -> Tensor:
    """Row that makes each column of o_proj, which reads head by head."""
    heads = torch.arange(cfg.num_attention_heads)
    if cfg.mla is None:
        dim = cfg.head_dim
        first = heads * cfg.num_key_value_heads // cfg.num_attention_heads * dim
    else:
        dim = cfg.mla.value
        first = heads * (cfg.mla.nope + dim) + cfg.mla.nope
    return (first[:, None] + torch.arange(dim)).flatten()

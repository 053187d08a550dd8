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

from deepseek_compress.models.config import ModelConfig
from deepseek_compress.models.family import Family


class Fold(NamedTuple):
    """Channels, who makes them and who reads them. Names are modules of the block: "mlp.up_proj"."""

    producer: str  # a norm or a linear
    linears: tuple[str, ...]  # that read the channels: the columns of each are channels
    router: str | None = None  # that reads them too
    rows: Tensor | None = None  # int64 (columns,): row of the producer that makes each column; None: in order


def folds(family: Family, cfg: ModelConfig, layer: int) -> list[Fold]:
    """Every place of block `layer`, in the order in which its channels are made."""
    if cfg.compressed is not None:
        return []
    readers: dict[str, tuple[str, ...]] = {}
    for linear in family.linears(cfg, layer):
        readers[linear.input] = (*readers.get(linear.input, ()), linear.name)
    attention = "self_attn."
    found = [Fold("input_layernorm", readers[attention + "in"])]
    if cfg.mla is not None:
        if cfg.mla.q_lora_rank is not None:
            found.append(Fold(attention + "q_a_layernorm", readers[attention + "q_b_proj"]))
        found.append(Fold(attention + "kv_a_layernorm", readers[attention + "kv_b_proj"]))
    values = attention + ("v_proj" if cfg.mla is None else "kv_b_proj")
    found.append(Fold(values, (attention + "o_proj",), rows=_value_rows(cfg)))
    moe = cfg.moe if cfg.is_moe(layer) else None
    normed = [names for source, names in readers.items() if source.endswith(".in") and source != attention + "in"]
    router = moe.names.router.removesuffix(".weight") if moe else None
    found.append(Fold("post_attention_layernorm", tuple(name for names in normed for name in names), router))
    found += [Fold(names[1], readers[names[1].replace("up_proj", "down_proj")]) for names in normed]
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

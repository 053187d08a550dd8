"""State that a token of DeepSeek-V4.1 carries from block to block, as one row of numbers.

    streams | pre | token | entry | index key | chosen entries | candidate blocks

Beside the residual streams: the weights that collapse them at the next site, since each site hands its own on; the
token's id, for Engram; and what a source block made for those after it. All of it is a row of the hidden state, so that
whatever stores, moves or resumes hidden states carries it too. Integers are exact in float32 below 2^24; -1
stands for none. Entry j of `rate` tokens each lies in the row of its last token, (j + 1) rate - 1, so that no row
depends on later tokens.

B texts, T tokens, N streams, W entries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_compress.models.config import ModelConfig


class Carried(NamedTuple):
    """The parts of rows (B, T, width), each in the rows' type."""

    streams: Tensor  # (B, T, N, hidden)
    pre: Tensor  # (B, T, N)
    tokens: Tensor  # (B, T)
    entries: Tensor  # (B, T, head_dim)
    keys: Tensor  # (B, T, index head_dim)
    chosen: Tensor  # (B, T, top_k), rising
    candidates: Tensor  # (B, T, candidate blocks), rising

    def row(self) -> Tensor:
        """(B, T, width)."""
        parts = (part.flatten(2) if part.dim() > 2 else part.unsqueeze(-1) for part in self)
        return torch.cat([part.to(self.streams.dtype) for part in parts], dim=-1)


def widths(cfg: ModelConfig) -> list[int]:
    """Numbers of each part."""
    assert cfg.streams is not None and cfg.indexer is not None and cfg.entries is not None
    n = cfg.streams.streams
    own = [n * cfg.hidden_size, n, 1, cfg.head_dim, cfg.indexer.head_dim]
    return [*own, cfg.indexer.top_k, cfg.entries.candidate_blocks]


def carried(cfg: ModelConfig, row: Tensor) -> Carried:
    """row (B, T, width) -> its parts."""
    streams, pre, tokens, *rest = torch.split(row, widths(cfg), dim=-1)
    return Carried(streams.reshape(*pre.shape, -1), pre, tokens.squeeze(-1), *rest)


def first(cfg: ModelConfig, embedded: Tensor, tokens: Tensor) -> Tensor:
    """embedded (B, T, hidden) of tokens (B, T) -> the first block's rows: equal streams, of which the first counts."""
    assert cfg.streams is not None
    n = cfg.streams.streams
    _, _, _, *rest = widths(cfg)
    pre = torch.zeros(*tokens.shape, n, dtype=embedded.dtype, device=embedded.device)
    pre[..., 0] = 1
    empty = [torch.full((*tokens.shape, width), value, dtype=embedded.dtype, device=embedded.device)
             for width, value in zip(rest, (0.0, 0.0, -1.0, -1.0), strict=True)]  # fmt: skip
    streams = embedded.unsqueeze(2).expand(-1, -1, n, -1)
    return Carried(streams, pre, tokens.to(embedded.device), *empty).row()


def spread_entries(entries: Tensor, rate: int, tokens: int) -> Tensor:
    """entries (B, W, dim) of `rate` tokens each -> (B, T, dim), each in the row of its last token, zeros elsewhere."""
    out = entries.new_zeros(len(entries), tokens, entries.shape[2])
    out[:, rate - 1 :: rate] = entries
    return out


def gathered_entries(rows: Tensor, rate: int) -> Tensor:
    """Return the reverse: (B, T, dim) -> (B, W, dim)."""
    return rows[:, rate - 1 :: rate]

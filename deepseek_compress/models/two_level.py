"""Which entries a query of DeepSeek-V4.1 sees: the best by an indexer, later ones only from the best blocks of entries.

    S[p, j] = sum_h relu(q_h(p) k(j)) w_h(p)          j < L(p): entries that end before or at p

The candidate source keeps, for each query, the blocks of neighbouring entries with the best single score, and always
the newest; indexers after it choose within those. Scores are float32 (the published kernels': BF16, so that choices
that are nearly equal differ). B texts, T tokens, W entries, H index heads. Source: DeepSeek-V4.1-Flash,
inference/model.py (Indexer).
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_compress.models.attend import SCORES_AT_ONCE
from deepseek_compress.models.config import SharedEntries
from deepseek_compress.models.wide import wide

CLOSED = float("-inf")


def scores(q: Tensor, keys: Tensor, share: Tensor, visible: Tensor) -> Tensor:
    """q (B, H, T, D), keys (B, W, D), share (B, T, H), visible (B, T): L(p) -> (B, T, W), -inf where not visible."""
    batch, heads, tokens, _ = q.shape
    step = max(1, SCORES_AT_ONCE // max(1, batch * heads * keys.shape[1]))
    flat = wide(keys).mT.unsqueeze(1)
    parts = [
        torch.einsum("bhtw,bth->btw", torch.relu(wide(q[:, :, at : at + step]) @ flat), wide(share[:, at : at + step]))
        for at in range(0, tokens, step)
    ]
    found = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return found.masked_fill(~seen(visible, keys.shape[1]), CLOSED)


def seen(visible: Tensor, entries: int) -> Tensor:
    """bool (B, T, W): entries below `visible` (B, T)."""
    return torch.arange(entries, device=visible.device) < visible.unsqueeze(-1)


def best(scored: Tensor, top_k: int) -> Tensor:
    """scored (B, T, W) -> int64 (B, T, top_k): places of the best, rising after as many -1 as there are too few."""
    places = _picked(scored, top_k)
    return torch.nn.functional.pad(places, (top_k - places.shape[-1], 0), value=-1)


def candidates(scored: Tensor, visible: Tensor, how: SharedEntries) -> Tensor:
    """scored (B, T, W), visible (B, T) -> int64 (B, T, candidate_blocks): the blocks kept, rising, -1 for none."""
    size = how.candidate_block_size
    padded = torch.nn.functional.pad(scored, (0, -scored.shape[-1] % size), value=CLOSED)
    blocks = padded.view(*padded.shape[:2], padded.shape[2] // size, size).amax(-1)
    newest = torch.arange(blocks.shape[-1], device=scored.device) == ((visible - 1) // size).unsqueeze(-1)
    return best(blocks.masked_fill(newest & (visible > 0).unsqueeze(-1), float("inf")), how.candidate_blocks)


def within(scored: Tensor, kept: Tensor, how: SharedEntries) -> Tensor:
    """scored (B, T, W) with -inf outside the blocks `kept` (B, T, candidate_blocks)."""
    size, entries = how.candidate_block_size, scored.shape[-1]
    opened = opened_places(kept, -(-entries // size)).repeat_interleave(size, dim=-1)[..., :entries]
    return scored.masked_fill(~opened, CLOSED)


def opened_places(places: Tensor, count: int) -> Tensor:
    """places (B, T, K), -1 for none -> bool (B, T, count)."""
    out = torch.zeros(*places.shape[:2], count + 1, dtype=torch.bool, device=places.device)
    none = torch.full_like(places, count)
    return out.scatter(-1, torch.where(places < 0, none, places), True)[..., :count]


def shared(reference: Tensor, found: Tensor) -> tuple[int, int]:
    """Two choices (n, K), rising, -1 for none -> (how many of the reference's the other has, how many there are)."""
    place = torch.searchsorted(found, reference).clamp(max=found.shape[-1] - 1)
    real = reference >= 0
    return int(((found.gather(-1, place) == reference) & real).sum()), int(real.sum())


def _picked(scored: Tensor, top_k: int) -> Tensor:
    found = scored.topk(min(top_k, scored.shape[-1]), dim=-1)
    places = torch.where(found.values == CLOSED, torch.full_like(found.indices, -1), found.indices)
    return places.sort(dim=-1).values

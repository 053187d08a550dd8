"""Softmax of queries over keys: whole texts or new tokens, heads that share keys, few scores in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deepseek_compress.models.attention8 import attend_int8
from deepseek_compress.models.wide import wide_type

SCORES_AT_ONCE = 1 << 20  # attention scores held at a time, so that they stay in the cache


def causal_mask(new: int, seen: int, like: Tensor) -> Tensor:
    """Additive (new, seen): 0 where a query may look, -inf at later tokens; the last query sees everything."""
    mask = torch.full((new, seen), float("-inf"), dtype=like.dtype, device=like.device)
    return mask.triu(seen - new + 1)


def attend(
    pairs: Sequence[tuple[Tensor, Tensor]],
    values: Tensor,
    scale: float,
    mask: Tensor | None,
    sinks: Tensor | None = None,
    int8: bool = False,
) -> Tensor:
    """softmax(scale * sum_i q_i k_i^T + mask) v.

    `pairs`: (q (B, H, T, D_i), k (B, H, S, D_i)), whose scores add up: latent attention has two parts. Keys and
    `values` (B, H, S, D_v) may have fewer heads, each shared by as many neighbouring queries. `mask` additive
    (B or 1, 1, T, S), None means causal. `sinks` (H,): a score that takes its share of the softmax and gives nothing.
    `int8`: the products rounded to 8 bits, see `attention8`. -> (B, H, T, D_v)
    """
    batch, heads, new, _ = pairs[0][0].shape
    seen = values.shape[2]
    step = max(1, min(new, SCORES_AT_ONCE // max(1, batch * heads * seen)))
    if int8:
        return attend_int8(pairs, values, scale, mask, step)
    scaled = [(q * scale, k) for q, k in pairs]
    parts = []
    for start in range(0, new, step):
        stop = min(start + step, new)
        last = seen if mask is not None else seen - new + stop  # nothing after it is visible
        q, k = scaled[0]
        scores = _scores(q[:, :, start:stop], k[:, :, :last])
        for q, k in scaled[1:]:
            scores = scores.add_(_scores(q[:, :, start:stop], k[:, :, :last]))
        if mask is not None:
            scores = scores.add_(mask[:, :, start:stop])
        elif stop - start > 1:
            own = stop - start  # the last columns are the queries' own tokens; all before them is visible
            scores[..., last - own :] += causal_mask(own, own, scores)
        parts.append(grouped_product(softmax(scores, sinks).to(values.dtype), values[:, :, :last]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """float32 (B, H, T, S), float64 of such scores; with `sinks` a row's weights add up to less than one."""
    kind = wide_type(scores)
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=kind)
    sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
    return torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1, dtype=kind)[..., :-1]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, T, D), k (B, G, S, D) -> (B, H, T, S)."""
    return grouped_product(q, k.mT)


def grouped_product(left: Tensor, right: Tensor) -> Tensor:
    """left (B, H, T, X) @ right (B, G, X, Y), head h of the left with head h * G // H of the right."""
    batch, heads, new, inner = left.shape
    groups = right.shape[1]
    if groups == heads:
        return left @ right
    # one product for all heads of a group: broadcasting would copy the right side for each of them
    rows = left.reshape(batch, groups, heads // groups * new, inner)
    return (rows @ right).view(batch, heads, new, right.shape[-1])

"""The parts of a decoder block that all families share. Every function is pure and differentiable.

B batch, T new tokens, S tokens seen (earlier ones from the cache and the new ones), H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.models.cache import KvCache
from deepseek_compress.models.config import FFN_NAMES, FfnNames, ModelConfig
from deepseek_compress.models.rope import cos_sin, rotate, softmax_scale
from deepseek_compress.models.weights import Weights

SCORES_AT_ONCE = 1 << 26  # attention scores held at a time; more queries than that are taken in turns


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu(weights: Weights, name: str, x: Tensor, limit: float | None = None, names: FfnNames = FFN_NAMES) -> Tensor:
    """down(silu(gate(x)) * up(x)); with `limit`, gate is clipped above and up on both sides."""
    gate, up = weights.linear(f"{name}.{names.gate}", x), weights.linear(f"{name}.{names.up}", x)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return weights.linear(f"{name}.{names.down}", functional.silu(gate) * up)


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
) -> Tensor:
    """softmax(scale * sum_i q_i k_i^T + mask) v.

    `pairs`: (q (B, H, T, D_i), k (B, H or 1, S, D_i)), whose scores add up: latent attention has two parts, and the
    rotated keys of one are shared by all heads. `values` (B, H or 1, S, D_v). `mask` additive (B or 1, 1, T, S), None
    means causal. `sinks` (H,): a score that takes its share of the softmax and gives nothing. -> (B, H, T, D_v)
    """
    batch, heads, new, _ = pairs[0][0].shape
    seen = values.shape[2]
    if mask is None and new > 1:
        mask = causal_mask(new, seen, values)[None, None]
    step = max(1, min(new, SCORES_AT_ONCE // max(1, batch * heads * seen)))
    parts = []
    for start in range(0, new, step):
        rows = slice(start, start + step)
        q, k = pairs[0]
        scores = _scores(q[:, :, rows], k)
        for q, k in pairs[1:]:
            scores = scores + _scores(q[:, :, rows], k)
        scores = scores * scale
        if mask is not None:
            scores = scores + mask[:, :, rows]
        if sinks is not None:
            sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(batch, -1, scores.shape[2], 1)
            scores = torch.cat((scores, sink), dim=-1)
        share = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
        parts.append((share[..., :seen] if sinks is not None else share) @ values)
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, T, D), k (B, H or 1, S, D) -> (B, H, T, S)."""
    batch, heads, new, dim = q.shape
    if k.shape[1] == heads:
        return q @ k.mT
    # one product for all heads: broadcasting would copy the keys for each of them
    return (q.reshape(batch, 1, heads * new, dim) @ k.mT).view(batch, heads, new, -1)


def grouped_attention(
    cfg: ModelConfig,
    layer: int,
    weights: Weights,
    x: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    cache: KvCache | None,
) -> Tensor:
    """Grouped-query attention of Llama and Qwen2: x (B, T, hidden) -> (B, T, hidden)."""
    batch, new, _ = x.shape
    heads, kv_heads, dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    q = weights.linear("self_attn.q_proj", x).view(batch, new, heads, dim).transpose(1, 2)
    k = weights.linear("self_attn.k_proj", x).view(batch, new, kv_heads, dim).transpose(1, 2)
    v = weights.linear("self_attn.v_proj", x).view(batch, new, kv_heads, dim).transpose(1, 2)
    cos, sin = cos_sin(cfg.rope, positions)
    q, k = rotate(cfg.rope, q, cos, sin), rotate(cfg.rope, k, cos, sin)
    if cache is not None:
        k, v = cache.update(layer, k, v)
    if heads != kv_heads:
        # queries of one group become rows of one head, so that keys and values are not repeated
        return weights.linear("self_attn.o_proj", _grouped(cfg, q, k, v, mask))
    out = attend([(q, k)], v, softmax_scale(cfg.rope, dim), mask)
    return weights.linear("self_attn.o_proj", out.transpose(1, 2).reshape(batch, new, heads * dim))


def _grouped(cfg: ModelConfig, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    batch, heads, new, dim = q.shape
    kv_heads, seen = k.shape[1], k.shape[2]
    share = heads // kv_heads
    if mask is None:
        mask = causal_mask(new, seen, v)[None, None]
    # row g * T + t of a key head is query t of the g-th head that shares it
    rows = q.reshape(batch, kv_heads, share * new, dim)
    out = attend([(rows, k)], v, softmax_scale(cfg.rope, dim), mask.repeat(1, 1, share, 1))
    return out.view(batch, heads, new, dim).transpose(1, 2).reshape(batch, new, heads * dim)

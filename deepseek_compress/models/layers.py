"""The parts of a decoder block that all families share. Every function is pure and differentiable.

B batch, T new tokens, S tokens seen (earlier ones from the cache and the new ones), H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.models.attention8 import attend_int8
from deepseek_compress.models.cache import KvCache
from deepseek_compress.models.config import FFN_NAMES, FfnNames, ModelConfig
from deepseek_compress.models.rope import cos_sin, rotate, softmax_scale
from deepseek_compress.models.weights import Weights

SCORES_AT_ONCE = 1 << 20  # attention scores held at a time, so that they stay in the cache


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
        parts.append(_shared(_softmax(scores, sinks).to(values.dtype), values[:, :, :last]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """float32 (B, H, T, S); with `sinks` a row's shares add up to less than one."""
    if sinks is None:
        return torch.softmax(scores, dim=-1, dtype=torch.float32)
    sink = sinks.to(scores.dtype).view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
    return torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1, dtype=torch.float32)[..., :-1]


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """q (B, H, T, D), k (B, G, S, D) -> (B, H, T, S)."""
    return _shared(q, k.mT)


def _shared(left: Tensor, right: Tensor) -> Tensor:
    """left (B, H, T, X) @ right (B, G, X, Y), head h of the left with head h * G // H of the right."""
    batch, heads, new, inner = left.shape
    groups = right.shape[1]
    if groups == heads:
        return left @ right
    # one product for all heads of a group: broadcasting would copy the right side for each of them
    rows = left.reshape(batch, groups, heads // groups * new, inner)
    return (rows @ right).view(batch, heads, new, right.shape[-1])


def grouped_attention(
    cfg: ModelConfig,
    layer: int,
    weights: Weights,
    x: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    cache: KvCache | None,
) -> Tensor:
    """Grouped-query attention of Llama, Qwen2 and Qwen3: x (B, T, hidden) -> (B, T, hidden)."""
    batch, new, _ = x.shape
    heads, kv_heads, dim, names = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim, cfg.names
    q = weights.linear(names.q, x).view(batch, new, heads, dim)
    k = weights.linear(names.k, x).view(batch, new, kv_heads, dim)
    if cfg.qk_norm:
        q = rms_norm(q, weights[f"{names.q_norm}.weight"], cfg.rms_norm_eps)
        k = rms_norm(k, weights[f"{names.k_norm}.weight"], cfg.rms_norm_eps)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    v = weights.linear(names.v, x).view(batch, new, kv_heads, dim).transpose(1, 2)
    cos, sin = cos_sin(cfg.rope, positions)
    q, k = rotate(cfg.rope, q, cos, sin), rotate(cfg.rope, k, cos, sin)
    if cache is not None:
        k, v = cache.update(layer, *cache.rounded(layer, positions, k, v))
    int8 = cache is not None and cache.int8
    out = attend([(q, k)], v, softmax_scale(cfg.rope, dim), mask, int8=int8)
    return weights.linear(names.o, out.transpose(1, 2).reshape(batch, new, heads * dim))

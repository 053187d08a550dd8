"""The parts of a decoder block that all families share. Every function is pure and differentiable.

B batch, T new tokens, S tokens seen (earlier ones from the cache and the new ones), H heads, D channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.models.attend import attend
from deepseek_compress.models.cache import KvCache
from deepseek_compress.models.config import FFN_NAMES, FfnNames, ModelConfig
from deepseek_compress.models.rope import cos_sin, rotate, softmax_scale
from deepseek_compress.models.weights import Weights
from deepseek_compress.models.wide import wide


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32 (float64 of such an x)."""
    values = wide(x)
    return weight * (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def swiglu(weights: Weights, name: str, x: Tensor, limit: float | None = None, names: FfnNames = FFN_NAMES) -> Tensor:
    """down(silu(gate(x)) * up(x)); with `limit`, gate is clipped above and up on both sides."""
    gate, up = weights.linear(f"{name}.{names.gate}", x), weights.linear(f"{name}.{names.up}", x)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(min=-limit, max=limit)
    return weights.linear(f"{name}.{names.down}", functional.silu(gate) * up)


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
    scale = softmax_scale(cfg.rope, dim)
    if cache is None:
        out = attend([(q, k)], v, scale, mask)
    else:
        k, v, *rest = cache.update(layer, *cache.rounded(layer, positions, k, v))
        coarse = ([(q, rest[0])], rest[1]) if rest else None
        out = cache.attend(layer, positions, [(q, k)], v, scale, mask, coarse)
    return weights.linear(names.o, out.transpose(1, 2).reshape(batch, new, heads * dim))

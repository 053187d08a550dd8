"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1), and the indexer of DeepSeek-V3.2.

The cache holds the expanded keys and values, not the latent: on a CPU and at the sizes that run here whole, expanding
each token once is faster than carrying `kv_b_proj` into every step. Rounding meets the latent and the rotated key,
which are what an engine's cache holds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.models.attend import attend, causal_mask
from deepseek_compress.models.cache import KvCache
from deepseek_compress.models.config import Indexer, Mla, ModelConfig
from deepseek_compress.models.layers import rms_norm
from deepseek_compress.models.rope import cos_sin, rotate, softmax_scale
from deepseek_compress.models.weights import Weights

LATENT_EPS = 1e-6  # of the norms of the latents, in the published code whatever rms_norm_eps is
INDEX_EPS = 1e-6  # of the indexer's layer norm, likewise


def latent_attention(
    cfg: ModelConfig,
    layer: int,
    weights: Weights,
    x: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    cache: KvCache | None,
) -> Tensor:
    """x (B, T, hidden) -> (B, T, hidden)."""
    mla = cfg.mla
    if mla is None:
        raise ValueError(f"{cfg.model_type} has no latent attention")
    batch, new, _ = x.shape
    q_latent, q = _queries(cfg, mla, weights, x)
    kv = weights.linear(cfg.names.kv_a, x)
    latent, k_rope = torch.split(kv, [mla.kv_lora_rank, mla.rope], dim=-1)
    latent = rms_norm(latent, weights[f"{cfg.names.kv_a_norm}.weight"], LATENT_EPS)
    cos, sin = cos_sin(cfg.rope, positions)
    k_rope = rotate(cfg.rope, k_rope.unsqueeze(1), cos, sin)
    entries = [k_rope, latent.unsqueeze(1)]
    if cache is not None:
        entries = list(cache.rounded(layer, positions, *entries))
    expanded = [part for k, c in zip(entries[::2], entries[1::2], strict=True)
                for part in (*_expanded(cfg, mla, weights, c.squeeze(1)), k)]  # fmt: skip
    q_nope, q_rope = torch.split(q, [mla.nope, mla.rope], dim=-1)
    q_rope = rotate(cfg.rope, q_rope, cos, sin)
    k_index = None
    if cfg.indexer is not None:
        k_index = _index_keys(cfg, cfg.indexer, weights, x, cos, sin)
    if cache is not None and k_index is not None:
        *expanded, k_index = cache.update(layer, *expanded, k_index)
    elif cache is not None:
        expanded = list(cache.update(layer, *expanded))
    k_nope, v, k_rope, *rest = expanded
    if cfg.indexer is not None and k_index is not None and q_latent is not None:
        mask = _sparse_mask(cfg, cfg.indexer, weights, x, q_latent, k_index, cos, sin, mask)
    pairs, scale = [(q_nope, k_nope), (q_rope, k_rope)], softmax_scale(cfg.rope, mla.nope + mla.rope)
    if cache is None:
        out = attend(pairs, v, scale, mask)
    else:
        coarse = ([(q_nope, rest[0]), (q_rope, rest[2])], rest[1]) if rest else None
        out = cache.attend(layer, positions, pairs, v, scale, mask, coarse)
    return weights.linear(cfg.names.o, out.transpose(1, 2).reshape(batch, new, -1))


def _expanded(cfg: ModelConfig, mla: Mla, weights: Weights, latent: Tensor) -> tuple[Tensor, Tensor]:
    """Keys without rotation and values of all heads, (B, H, T, nope) and (B, H, T, value), from latents."""
    batch, new, _ = latent.shape
    heads = weights.linear(cfg.names.kv_b, latent).view(batch, new, -1, mla.nope + mla.value).transpose(1, 2)
    keys, values = torch.split(heads, [mla.nope, mla.value], dim=-1)
    return keys, values


def _queries(cfg: ModelConfig, mla: Mla, weights: Weights, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return the query latent, where there is one, and the queries (B, H, T, nope + rope)."""
    latent = None
    if mla.q_lora_rank is None:
        q = weights.linear(cfg.names.q, x)
    else:
        latent = weights.linear(cfg.names.q_a, x)
        latent = rms_norm(latent, weights[f"{cfg.names.q_a_norm}.weight"], LATENT_EPS)
        q = weights.linear(cfg.names.q_b, latent)
    return latent, q.view(x.shape[0], x.shape[1], cfg.num_attention_heads, -1).transpose(1, 2)


def _index_keys(cfg: ModelConfig, indexer: Indexer, weights: Weights, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Keys of the indexer, (B, 1, T, head_dim): one head, layer-normed, its first channels rotated."""
    k = weights.linear("self_attn.indexer.wk", x)
    norm = "self_attn.indexer.k_norm"
    k = functional.layer_norm(k, (indexer.head_dim,), weights[norm + ".weight"], weights[norm + ".bias"], INDEX_EPS)
    return _rotate_front(cfg, k.unsqueeze(1), cos, sin)


def _rotate_front(cfg: ModelConfig, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    # The indexer pairs channel i with i + dim/2, unlike the attention
    half, dim = cfg.rope.dim // 2, cfg.rope.dim
    first, second = x[..., :half], x[..., half:dim]
    rotated = (first * cos - second * sin, second * cos + first * sin, x[..., dim:])
    return torch.cat(rotated, dim=-1)


def _sparse_mask(
    cfg: ModelConfig,
    indexer: Indexer,
    weights: Weights,
    x: Tensor,
    q_latent: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor | None,
) -> Tensor:
    """Additive (B, 1, T, S): `mask` and -inf at every token that is not among the indexer's `top_k` of the query.

    index score(t, s) = sum over heads of w_h(t) * relu(q_h(t) k(s) / sqrt(head_dim)). The published kernels score in
    FP8 after a Hadamard rotation, which keeps inner products; here float32.
    """
    batch, new, _ = x.shape
    seen = k.shape[2]
    if mask is None:
        mask = causal_mask(new, seen, x)[None, None]
    q = weights.linear("self_attn.indexer.wq_b", q_latent).view(batch, new, indexer.heads, -1).transpose(1, 2)
    q = _rotate_front(cfg, q, cos, sin)
    scores = torch.relu(q.float() @ k.float().mT * indexer.head_dim**-0.5)  # (B, heads, T, S)
    share = weights.linear("self_attn.indexer.weights_proj", x).float() * indexer.heads**-0.5  # (B, T, heads)
    index = torch.einsum("bhts,bth->bts", scores, share) + mask[:, 0]
    chosen = index.topk(min(indexer.top_k, seen), dim=-1).indices
    closed = torch.full_like(index, float("-inf")).scatter(-1, chosen, 0.0)
    return mask + closed.unsqueeze(1).to(mask.dtype)

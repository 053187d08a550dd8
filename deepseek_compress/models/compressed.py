"""Attention of DeepSeek-V4: one key-value head, a sliding window, and compressed entries for what lies before it.

A block is of one of three kinds: the window alone; the window and entries of many tokens each ("heavily compressed");
the window and entries of few tokens, overlapping, of which an indexer chooses the best for each query ("compressed
sparse attention"). Keys are the values: what rotation put into a value is taken out of the output again.
B batch, T tokens, W entries, H heads, D channels of a head. There is no cache: a whole text is run at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_compress.models.attend import attend
from deepseek_compress.models.config import Compressed, Indexer, ModelConfig, Rope
from deepseek_compress.models.layers import rms_norm
from deepseek_compress.models.rope import cos_sin
from deepseek_compress.models.weights import Weights
from deepseek_compress.models.wide import wide


def compressed_attention(
    cfg: ModelConfig, layer: int, weights: Weights, x: Tensor, positions: Tensor, mask: Tensor | None
) -> Tensor:
    """x (B, T, hidden) -> (B, T, hidden)."""
    kinds = cfg.compressed
    if kinds is None:
        raise ValueError(f"{cfg.model_type} has no compressed attention")
    batch, new, _ = x.shape
    rope = cfg.rope if kinds.rates[layer] else kinds.rope_window
    q_latent = rms_norm(weights.linear("attn.wq_a", x), weights["attn.q_norm.weight"], cfg.rms_norm_eps)
    q = weights.linear("attn.wq_b", q_latent).view(batch, new, -1, cfg.head_dim).transpose(1, 2)
    q = rotate_tail(rope, q * torch.rsqrt(q.float().square().mean(-1, keepdim=True) + cfg.rms_norm_eps), positions)
    kv = rms_norm(weights.linear("attn.wkv", x), weights["attn.kv_norm.weight"], cfg.rms_norm_eps)
    kv = rotate_tail(rope, kv.unsqueeze(1), positions)
    bias = window_mask(kinds.window, new, kv) if mask is None else mask + window_mask(kinds.window, new, kv)
    if kinds.rates[layer]:
        rate = kinds.rates[layer]
        found = entries(cfg, weights, "attn.compressor", x, rate, cfg.head_dim, kinds.overlapping[layer])
        ready = (positions + 1) // rate  # entries that end before a query
        if kinds.overlapping[layer] and cfg.indexer is not None:
            open_ = _chosen(cfg, cfg.indexer, weights, x, q_latent, positions, ready, rate)
        else:
            open_ = torch.arange(found.shape[1], device=x.device) < ready.unsqueeze(-1)  # (B, T, W)
        closed = torch.zeros(open_.shape, dtype=kv.dtype, device=x.device).masked_fill(~open_, float("-inf"))
        kv = torch.cat((kv, found.unsqueeze(1)), dim=2)
        bias = torch.cat((bias.expand(batch, -1, -1, -1), closed.unsqueeze(1)), dim=-1)
    out = attend([(q, kv)], kv, cfg.head_dim**-0.5, bias, weights["attn.attn_sink"])
    out = rotate_tail(rope, out, positions, back=True).transpose(1, 2)  # (B, T, H, D)
    return weights.linear("attn.wo_b", _grouped_output(kinds, weights, out))


def rotate_tail(rope: Rope, x: Tensor, positions: Tensor, back: bool = False) -> Tensor:
    """Rotate the last `rope.dim` channels of x (B, H, T, D), pairs side by side, keeping their order."""
    cos, sin = cos_sin(rope, positions)
    sin = -sin if back else sin
    still, rotating = x[..., : -rope.dim], wide(x[..., -rope.dim :])
    first, second = rotating[..., 0::2], rotating[..., 1::2]
    pairs = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return torch.cat((still, pairs.flatten(-2).to(x.dtype)), dim=-1)


def window_mask(window: int, tokens: int, like: Tensor) -> Tensor:
    """Additive (1, 1, T, T): a query sees itself and the `window` - 1 tokens before it."""
    place = torch.arange(tokens, device=like.device)
    distance = place[:, None] - place
    hidden = (distance < 0) | (distance >= window)
    return torch.zeros(1, 1, tokens, tokens, dtype=like.dtype, device=like.device).masked_fill(hidden, float("-inf"))


def entries(cfg: ModelConfig, weights: Weights, name: str, x: Tensor, rate: int, dim: int, overlapping: bool) -> Tensor:
    """Every full window of `rate` tokens of x (B, T, hidden) as one entry: (B, W, dim), normed and rotated.

    An entry is the mean of its tokens' values, weighted by a softmax of their gates per channel. Overlapping entries
    take the first half of the channels from the window before and the second half from their own.
    """
    batch = x.shape[0]
    full = x.shape[1] // rate
    bias = weights[name + ".ape"]  # (rate, dim) or (rate, 2 dim)
    kv = weights.linear(name + ".wkv", x)[:, : full * rate].reshape(batch, full, rate, bias.shape[1])
    gate = weights.linear(name + ".wgate", x)[:, : full * rate].reshape(batch, full, rate, bias.shape[1]) + bias
    if overlapping:
        kv, gate = _overlap(kv, dim, 0.0), _overlap(gate, dim, float("-inf"))
    mean = (kv * gate.softmax(dim=2, dtype=torch.float32).to(kv.dtype)).sum(2)
    mean = rms_norm(mean, weights[name + ".norm.weight"], cfg.rms_norm_eps)
    places = (torch.arange(full, device=x.device) * rate).expand(batch, -1)
    return rotate_tail(cfg.rope, mean.unsqueeze(1), places).squeeze(1)


def _overlap(values: Tensor, dim: int, first: float) -> Tensor:
    """(B, W, rate, 2 dim) -> (B, W, 2 rate, dim): the window before, then the own; `first` where there is none."""
    before, own = values[..., :dim], values[..., dim:]
    shifted = torch.cat((torch.full_like(before[:, :1], first), before[:, :-1]), dim=1)
    return torch.cat((shifted, own), dim=2)


def _chosen(
    cfg: ModelConfig,
    indexer: Indexer,
    weights: Weights,
    x: Tensor,
    q_latent: Tensor,
    positions: Tensor,
    ready: Tensor,
    rate: int,
) -> Tensor:
    """bool (B, T, W): the `top_k` entries of each query by the indexer's score, among those that are ready."""
    batch, new, _ = x.shape
    keys = entries(cfg, weights, "attn.indexer.compressor", x, rate, indexer.head_dim, overlapping=True)
    q = weights.linear("attn.indexer.wq_b", q_latent).view(batch, new, indexer.heads, -1).transpose(1, 2)
    q = rotate_tail(cfg.rope, q, positions)
    scores = torch.relu(q.float() @ keys.float().mT.unsqueeze(1)) * indexer.head_dim**-0.5  # (B, heads, T, W)
    share = weights.linear("attn.indexer.weights_proj", x).float() * indexer.heads**-0.5
    index = torch.einsum("bhtw,bth->btw", scores, share)
    ready_ones = torch.arange(index.shape[-1], device=x.device) < ready.unsqueeze(-1)
    index = index.masked_fill(~ready_ones, float("-inf"))
    best = index.topk(min(indexer.top_k, index.shape[-1]), dim=-1).indices
    return torch.zeros_like(ready_ones).scatter(-1, best, True) & ready_ones


def _grouped_output(kinds: Compressed, weights: Weights, out: Tensor) -> Tensor:
    """out (B, T, H, D) -> (B, T, groups * o_lora_rank): each group of heads has a projection of its own."""
    batch, new = out.shape[:2]
    grouped = out.reshape(batch, new, kinds.o_groups, -1)
    weight = weights["attn.wo_a.weight"].view(kinds.o_groups, kinds.o_lora_rank, -1)
    return torch.einsum("btgi,goi->btgo", grouped, weight.to(grouped.dtype)).flatten(2)

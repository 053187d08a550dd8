"""Attention of DeepSeek-V4.1 (CSA2): a sliding window, and entries that few blocks make and all read.

A source makes one entry of every `rate` tokens and a key of it for the indexer; blocks with an indexer choose among the
entries; all others read the last entries and the last choice. Keys are values, in one head: what rotation put into a
value is taken out of the output again. The published model rounds window keys to FP8, entries and the indexer's keys
and queries to FP4 before it uses them, and so does this (`SharedEntries.rounded`).

B texts, T tokens, W entries, H heads, D channels of a head. There is no cache: a whole text is run at once.
Source: DeepSeek-V4.1-Flash, inference/model.py (Attention, Compressor, Indexer).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from deepseek_compress.models import round_trip, two_level
from deepseek_compress.models.attend import attend
from deepseek_compress.models.carried import Carried, gathered_entries, spread_entries
from deepseek_compress.models.compressed import rotate_tail, window_mask
from deepseek_compress.models.config import Compressed, Indexer, ModelConfig, SharedEntries
from deepseek_compress.models.layers import rms_norm
from deepseek_compress.models.weights import Weights


def shared_attention(
    cfg: ModelConfig, layer: int, weights: Weights, x: Tensor, positions: Tensor, state: Carried
) -> tuple[Tensor, Carried]:
    """x (B, T, hidden) and what was carried here -> what attention adds (B, T, hidden), and what is carried on."""
    kinds, _, how = parts(cfg)
    batch, tokens, _ = x.shape
    rate = kinds.rates[layer]
    rope = cfg.rope if rate else kinds.rope_window
    latent = rms_norm(weights.linear("attn.wq_a", x), weights["attn.q_norm.weight"], cfg.rms_norm_eps)
    q = weights.linear("attn.wq_b", latent).view(batch, tokens, -1, cfg.head_dim).transpose(1, 2)
    q = rotate_tail(rope, q, positions)
    kv = rms_norm(weights.linear("attn.wkv", x), weights["attn.kv_norm.weight"], cfg.rms_norm_eps)
    kv = _rounded(how, round_trip.fp8, rotate_tail(rope, kv.unsqueeze(1), positions))
    bias = window_mask(kinds.window, tokens, kv)
    if rate:
        state = _published(cfg, layer, weights, x, latent, positions, state)
        found = gathered_entries(state.entries, rate).to(kv.dtype)
        opened = two_level.opened_places(state.chosen.long(), found.shape[1])  # (B, T, W)
        closed = torch.zeros(opened.shape, dtype=kv.dtype, device=x.device).masked_fill(~opened, float("-inf"))
        kv = torch.cat((kv, found.unsqueeze(1)), dim=2)
        bias = torch.cat((bias.expand(batch, -1, -1, -1), closed.unsqueeze(1)), dim=-1)
    out = attend([(q, kv)], kv, cfg.head_dim**-0.5, bias, weights["attn.attn_sink"])
    out = rotate_tail(rope, out, positions, back=True).transpose(1, 2)  # (B, T, H, D)
    return weights.linear("attn.wo_b", _grouped_output(kinds, weights, out)), state


def _published(
    cfg: ModelConfig, layer: int, weights: Weights, x: Tensor, q_latent: Tensor, positions: Tensor, state: Carried
) -> Carried:
    """Return what is carried on, with what this block makes or chooses."""
    kinds, _, how = parts(cfg)
    rate, tokens = kinds.rates[layer], x.shape[1]
    if layer in how.sources:
        made = _latents(cfg, rate, weights, x)  # (B, W, D), not rotated yet
        places = (torch.arange(made.shape[1], device=x.device) * rate).expand(len(x), -1)
        keys = weights.linear("attn.indexer.wk", made)
        keys = rms_norm(keys, weights["attn.indexer.k_norm.weight"], cfg.rms_norm_eps)
        keys = _rounded(how, round_trip.fp4, rotate_tail(cfg.rope, keys.unsqueeze(1), places)).squeeze(1)
        made = _rounded(how, round_trip.fp4_e4m3, rotate_tail(cfg.rope, made.unsqueeze(1), places)).squeeze(1)
        state = state._replace(entries=spread_entries(made, rate, tokens), keys=spread_entries(keys, rate, tokens))
    if layer in how.index_sources:
        state = _chosen(cfg, layer, weights, x, q_latent, positions, state)
    return state


def _latents(cfg: ModelConfig, rate: int, weights: Weights, x: Tensor) -> Tensor:
    """Every full window of `rate` tokens of x (B, T, hidden) as one vector (B, W, D), normed.

    The mean of its tokens' values, weighted by a softmax of their gates per channel; of one token, its value.
    """
    values = weights.linear("attn.compressor.wkv", x)
    if rate > 1:
        full = x.shape[1] // rate
        gates = weights.linear("attn.compressor.wgate", x)
        shape = (len(x), full, rate, values.shape[-1])
        values, gates = (part[:, : full * rate].reshape(shape) for part in (values, gates))
        values = (values * gates.softmax(dim=2)).sum(2)
    return rms_norm(values, weights["attn.compressor.norm.weight"], cfg.rms_norm_eps)


def _chosen(
    cfg: ModelConfig, layer: int, weights: Weights, x: Tensor, q_latent: Tensor, positions: Tensor, state: Carried
) -> Carried:
    """`state` with the entries that each query of this block and those after it sees."""
    kinds, indexer, how = parts(cfg)
    rate = kinds.rates[layer]
    q = weights.linear("attn.indexer.wq_b", q_latent).view(*x.shape[:2], indexer.heads, -1).transpose(1, 2)
    q = _rounded(how, round_trip.fp4, rotate_tail(cfg.rope, q, positions))
    share = weights.linear("attn.indexer.weights_proj", x) * (indexer.head_dim * indexer.heads) ** -0.5
    visible = (positions + 1) // rate
    scored = two_level.scores(q, gathered_entries(state.keys, rate), share, visible)
    if layer > how.candidate_source:
        scored = two_level.within(scored, state.candidates.long(), how)
    elif layer == how.candidate_source:
        state = state._replace(candidates=two_level.candidates(scored, visible, how))
    return state._replace(chosen=two_level.best(scored, indexer.top_k))


def _grouped_output(kinds: Compressed, weights: Weights, out: Tensor) -> Tensor:
    """out (B, T, H, D) -> (B, T, groups * o_lora_rank): each group of heads has a projection of its own."""
    grouped = out.reshape(*out.shape[:2], kinds.o_groups, -1)
    weight = weights["attn.wo_a.weight"].view(kinds.o_groups, kinds.o_lora_rank, -1)
    return torch.einsum("btgi,goi->btgo", grouped, weight.to(grouped.dtype)).flatten(2)


def _rounded(how: SharedEntries, rounding: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return rounding(x) if how.rounded else x


def parts(cfg: ModelConfig) -> tuple[Compressed, Indexer, SharedEntries]:
    """Return the attention's settings; ValueError for another family."""
    if cfg.compressed is None or cfg.indexer is None or cfg.entries is None:
        raise ValueError(f"{cfg.model_type} has no shared entries")
    return cfg.compressed, cfg.indexer, cfg.entries

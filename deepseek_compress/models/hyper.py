"""Manifold-constrained hyper-connections (DeepSeek-V4): N residual streams instead of one.

Before a part of the block the streams are collapsed to one by weights `pre`; after it, its output is spread over the
streams by `post` while the streams are mixed by `comb`, a doubly stochastic matrix (Sinkhorn-Knopp), so that the
residual does not grow with depth. All three follow from the streams themselves.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.models.config import HyperConnections
from deepseek_compress.models.weights import Weights
from deepseek_compress.models.wide import wide


class Mixing(NamedTuple):
    """One hyper-connection over streams (B, T, N, hidden)."""

    pre: Tensor  # (B, T, N)
    post: Tensor  # (B, T, N)
    comb: Tensor  # (B, T, N, N): comb[j, k] is what stream j gives to stream k


def normed(streams: Tensor, eps: float) -> Tensor:
    """(B, T, N, hidden) -> float32 (float64 of such streams) (B, T, N * hidden), of unit mean square."""
    flat = wide(streams.flatten(2))
    return flat * torch.rsqrt(flat.square().mean(-1, keepdim=True) + eps)


def mixing(hyper: HyperConnections, weights: Weights, name: str, streams: Tensor, norm_eps: float) -> Mixing:
    """Return the weights of the connection `name` ("hc_attn", "hc_ffn")."""
    n = hyper.streams
    x = normed(streams, norm_eps)
    values = functional.linear(x, weights[name + "_fn"].to(x.dtype))
    pre, post, comb = torch.split(values, [n, n, n * n], dim=-1)
    pre_base, post_base, comb_base = torch.split(weights[name + "_base"].to(x.dtype), [n, n, n * n])
    pre_scale, post_scale, comb_scale = weights[name + "_scale"].to(x.dtype).unbind(0)
    comb = (comb * comb_scale + comb_base).view(*comb.shape[:-1], n, n).softmax(-1) + hyper.eps
    comb = comb / (comb.sum(-2, keepdim=True) + hyper.eps)
    for _ in range(hyper.sinkhorn_iterations - 1):
        comb = comb / (comb.sum(-1, keepdim=True) + hyper.eps)
        comb = comb / (comb.sum(-2, keepdim=True) + hyper.eps)
    return Mixing(
        torch.sigmoid(pre * pre_scale + pre_base) + hyper.eps, 2 * torch.sigmoid(post * post_scale + post_base), comb
    )


def collapse(mixed: Mixing, streams: Tensor) -> Tensor:
    """(B, T, N, hidden) -> (B, T, hidden)."""
    return (mixed.pre.unsqueeze(-1) * streams).sum(2).to(streams.dtype)


def expand(mixed: Mixing, streams: Tensor, added: Tensor) -> Tensor:
    """Return the streams mixed, and `added` (B, T, hidden) spread over them: (B, T, N, hidden)."""
    kind = streams.dtype
    return mixed.post.to(kind).unsqueeze(-1) * added.unsqueeze(-2) + mixed.comb.to(kind).mT @ streams


def head(hyper: HyperConnections, weights: Weights, streams: Tensor, norm_eps: float) -> Tensor:
    """Return the last collapse, before the final norm: (B, T, N, hidden) -> (B, T, hidden)."""
    values = functional.linear(normed(streams, norm_eps), weights["hc_head_fn"].float())
    pre = torch.sigmoid(values * weights["hc_head_scale"].float() + weights["hc_head_base"].float()) + hyper.eps
    return (pre.unsqueeze(-1) * streams).sum(2).to(streams.dtype)

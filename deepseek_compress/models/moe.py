"""Mixture of experts: which experts a token goes to, and what they add.

Scores: softmax (DeepSeek-V2, arXiv 2405.04434, section 2.2), sigmoid with a bias that balances without an auxiliary
loss (DeepSeek-V3, arXiv 2412.19437, section 2.1.2; the bias chooses, the bare score weighs), sqrt(softplus)
(DeepSeek-V4). N tokens, E experts, K experts of a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.models.config import Moe
from deepseek_compress.models.layers import swiglu
from deepseek_compress.models.weights import Weights
from deepseek_compress.models.wide import wide


class Routing(NamedTuple):
    """Where each token goes."""

    experts: Tensor  # int64 (N, K)
    gate_weights: Tensor  # float32 (N, K), what the expert's output is multiplied with


def score(moe: Moe, weights: Weights, x: Tensor) -> Tensor:
    """x (N, hidden) -> float32 (N, E), float64 of such an x, before any bias."""
    x = wide(x)
    logits = functional.linear(x, weights[moe.names.router].to(x.dtype))
    if moe.scoring == "softmax":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if moe.scoring == "sigmoid" else functional.softplus(logits).sqrt()


def route(moe: Moe, weights: Weights, x: Tensor, tokens: Tensor | None = None) -> Routing:
    """x (N, hidden) -> Routing. `tokens` int64 (N,) are needed in blocks that are routed by token id."""
    scores = score(moe, weights, x)
    if moe.names.table in weights:
        if tokens is None:
            raise ValueError("a block routed by token id needs the tokens")
        experts = weights[moe.names.table][tokens].long()
    else:
        experts = _choose(moe, weights, scores.detach())
    gate_weights = scores.gather(1, experts)
    if moe.normalize:
        gate_weights = gate_weights / (gate_weights.sum(dim=-1, keepdim=True) + 1e-20)
    return Routing(experts, gate_weights * moe.scaling)


def _choose(moe: Moe, weights: Weights, scores: Tensor) -> Tensor:
    if moe.method == "noaux_tc":
        scores = scores + weights[moe.names.bias].to(scores.dtype)
    if moe.method != "greedy" and moe.groups > 1:
        groups = scores.view(len(scores), moe.groups, -1)
        best = groups.topk(2, dim=-1).values.sum(-1) if moe.method == "noaux_tc" else groups.amax(-1)
        kept = torch.zeros_like(best).scatter(1, best.topk(moe.top_groups, dim=-1).indices, 1.0)
        closed = float("-inf") if moe.method == "noaux_tc" else 0.0
        scores = groups.masked_fill(kept.unsqueeze(-1) == 0, closed).flatten(1)
    return scores.topk(moe.top_k, dim=-1).indices


def by_expert(routing: Routing, experts: int) -> list[Tensor]:
    """For each expert the places `token * K + slot` in the flattened routing that chose it, tokens in rising order."""
    flat = routing.experts.flatten()
    order = torch.argsort(flat, stable=True)
    return list(torch.split(order, torch.bincount(flat, minlength=experts).tolist()))


def run_expert(moe: Moe, weights: Weights, expert: int, x: Tensor) -> Tensor:
    """x (n, hidden), the tokens routed to `expert` -> (n, hidden)."""
    return swiglu(weights, f"{moe.names.experts}.{expert}", x, moe.swiglu_limit, moe.names)


def run_shared(moe: Moe, weights: Weights, x: Tensor) -> Tensor:
    """Return the experts that every token goes to, stored as one MLP."""
    return swiglu(weights, moe.names.shared, x, moe.swiglu_limit, moe.names)


def experts_part(
    moe: Moe, weights: Weights, x: Tensor, routing: Routing, experts: Iterable[int] | None = None
) -> Tensor:
    """Return what `experts` (default: all, in order) add to x (N, hidden) -> (N, hidden)."""
    places = by_expert(routing, moe.experts)
    gate_weights = routing.gate_weights.flatten()
    out = torch.zeros_like(x)
    for expert in range(moe.experts) if experts is None else experts:
        chosen = places[expert]
        if len(chosen):
            rows = chosen // moe.top_k
            y = run_expert(moe, weights, expert, x[rows]) * gate_weights[chosen, None].to(x.dtype)
            out.index_add_(0, rows, y)
    return out


def moe_part(moe: Moe, weights: Weights, x: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Routed and shared experts: x (B, T, hidden) -> (B, T, hidden), without the residual."""
    flat = x.reshape(-1, x.shape[-1])
    routing = route(moe, weights, flat, None if tokens is None else tokens.reshape(-1))
    out = experts_part(moe, weights, flat, routing).view_as(x)
    return out + run_shared(moe, weights, x) if moe.shared else out

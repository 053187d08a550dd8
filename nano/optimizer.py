"""Muon for the matrices, AdamW for the rest.

Muon (Jordan et al. 2024; the scaling of Liu et al. 2025, "Muon is scalable for LLM training", section 2.2): the
momentum of a matrix is replaced by the nearest orthogonal one, found by five Newton-Schulz steps, and scaled by
0.2 sqrt(max(rows, columns)), so that the learning rate of AdamW fits.

`pull` moves every weight towards zero by `lr * pull` a step (an L1 penalty, decoupled as AdamW decouples L2). Muon
alone leaves weights that look drawn from a normal distribution, which no published model has and which any rounding
spares; under the pull, few weights carry much and many carry little.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonal(momentum: Tensor) -> Tensor:
    """(..., rows, columns) -> the same shape, singular values near 1."""
    a, b, c = QUINTIC
    x = momentum / (momentum.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Parameters are matrices or stacks of them; the two halves of a fused `gate_up_proj` count as two matrices."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, weight_decay: float, pull: float, fused: set[int]
    ) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay, "pull": pull})
        self.fused = fused

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"].lerp_(weight.grad, 0.05)
                update = weight.grad.lerp(momentum, 0.95)
                stacked = (
                    update.view(-1, update.shape[-2] // 2, update.shape[-1]) if id(weight) in self.fused else update
                )
                update = orthogonal(stacked) * 0.2 * max(stacked.shape[-2:]) ** 0.5
                weight.sub_(weight.sign(), alpha=group["lr"] * group["pull"])
                weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.view_as(weight), alpha=group["lr"])


def optimizers(model: nn.Module, name: str, lr: float, weight_decay: float, pull: float) -> list[torch.optim.Optimizer]:
    """Make the optimizers that together hold every parameter."""
    matrices, others, fused = [], [], set()
    for key, weight in model.named_parameters():
        hidden = weight.ndim >= 2 and not any(part in key for part in ("embed_tokens", "lm_head", "gate.weight"))
        (matrices if hidden and name == "muon" else others).append(weight)
        if key.endswith("gate_up_proj"):
            fused.add(id(weight))
    decay = [weight for weight in others if weight.ndim >= 2]
    plain = [weight for weight in others if weight.ndim < 2]
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    found: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=decay[0].is_cuda)]
    return [*found, Muon(matrices, lr, weight_decay, pull, fused)] if matrices else found

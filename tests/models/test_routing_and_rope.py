"""Routing in groups and yarn with two temperatures, each against the slow formula."""

from __future__ import annotations

import math

import pytest
import torch

from deepseek_compress.models.config import Moe, Rope
from deepseek_compress.models.moe import route
from deepseek_compress.models.rope import cos_sin, softmax_scale
from deepseek_compress.models.weights import ResidentWeights


@pytest.mark.parametrize("method", ["group_limited_greedy", "noaux_tc"])
def test_experts_come_from_the_best_groups(method: str) -> None:
    """DeepSeek-V2: a group counts as its best expert; V3: as its best two, with the bias that shares leave out."""
    moe = Moe(
        12, 0, 3, 8, 0, groups=4, top_groups=2, method=method, scoring="softmax" if method[0] == "g" else "sigmoid"
    )
    generator = torch.Generator().manual_seed(4)
    gate, bias = torch.randn(12, 16, generator=generator), 0.3 * torch.randn(12, generator=generator)
    x = torch.randn(40, 16, generator=generator)
    found = route(moe, ResidentWeights({moe.names.router: gate, moe.names.bias: bias}), x)
    for token in range(40):
        logits = gate @ x[token]
        scores = logits.softmax(0) if method[0] == "g" else logits.sigmoid()
        ranked = scores if method[0] == "g" else scores + bias
        worth = [sum(sorted(ranked[3 * g : 3 * g + 3].tolist())[-(1 if method[0] == "g" else 2) :]) for g in range(4)]
        groups = sorted(range(4), key=lambda g: -worth[g])[:2]
        experts = sorted((e for g in groups for e in range(3 * g, 3 * g + 3)), key=lambda e: -float(ranked[e]))[:3]
        assert found.experts[token].tolist() == experts
        torch.testing.assert_close(found.gate_weights[token], scores[experts])


@pytest.mark.parametrize(("mscale", "all_dim"), [(0.7, 1.3), (1.0, 1.0), (0.0, 0.8)])
def test_yarn_scales_cosines_by_one_temperature_and_scores_by_the_other(mscale: float, all_dim: float) -> None:
    rope = Rope(
        theta=10000, dim=8, kind="yarn", factor=4, original_length=64, mscale=mscale, mscale_all_dim=all_dim
    )  # fmt: skip

    def temperature(m: float) -> float:
        return 0.1 * m * math.log(4) + 1

    cos, sin = cos_sin(rope, torch.tensor([[0, 5]]))
    want = temperature(mscale) / temperature(all_dim) if mscale else temperature(1.0)
    torch.testing.assert_close(cos[0, 0, 0], torch.full((4,), want))
    torch.testing.assert_close((cos.square() + sin.square()).sqrt(), torch.full_like(cos, want))
    assert softmax_scale(rope, 16) == pytest.approx(16**-0.5 * temperature(all_dim) ** 2)

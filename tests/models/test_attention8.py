"""Attention in 8 bits against its formula, number by number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.models.activations import input_scheme
from deepseek_compress.models.attend import attend, causal_mask
from deepseek_compress.models.attention8 import attend_int8
from deepseek_compress.models.families.table import family_of
from deepseek_compress.models.runtime import Model

B, H, G, T, S, V = 2, 4, 2, 5, 9, 6
SCALE = 0.2
Pairs = list[tuple[Tensor, Tensor]]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3


def grouped() -> tuple[Pairs, Tensor]:
    return [(normal(B, H, T, 8, seed=0), normal(B, G, S, 8, seed=1))], normal(B, G, S, V, seed=2)


def latent() -> tuple[Pairs, Tensor]:
    nope = (normal(B, H, T, 8, seed=3), normal(B, H, S, 8, seed=4))
    return [nope, (normal(B, H, T, 4, seed=5), normal(B, 1, S, 4, seed=6))], normal(B, H, S, V, seed=7)


def whole(row: Tensor) -> tuple[Tensor, Tensor]:
    scale = row.abs().max() / 127
    return (row / scale).round(), scale


def formula(pairs: Pairs, values: Tensor, mask: Tensor) -> Tensor:
    """One query at a time, in float64, as the file's head has it; `mask` bool (B, T, S)."""
    out = torch.zeros(B, H, T, values.shape[-1], dtype=torch.float64)
    for b, h, t in torch.cartesian_prod(torch.arange(B), torch.arange(H), torch.arange(T)).tolist():
        q = torch.cat([q[b, h, t] for q, _ in pairs])
        keys = torch.cat([k[b, h * k.shape[1] // H] for _, k in pairs], dim=-1)
        v = values[b, h * values.shape[1] // H]
        q8, q_scale = whole(q)
        rows = [whole(key) for key in keys]
        scores = torch.stack([(q8.double() @ k8.double()) * q_scale.double() * s.double() for k8, s in rows]) * SCALE
        shares = scores.masked_fill(~mask[b, t], float("-inf")).softmax(-1)
        step = shares.max() / 255
        columns = [whole(v[:, c] * mask[b, -1]) for c in range(v.shape[1])]
        p8 = (shares / step).round()
        out[b, h, t] = torch.stack([(p8 @ v8.double()) * s.double() for v8, s in columns]) * step
    return out


@pytest.mark.parametrize("make", [grouped, latent])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_the_formula_but_for_ties(make: object, masked: bool) -> None:
    pairs, values = make()  # type: ignore[operator]
    seen = torch.arange(S) <= torch.arange(S - T, S)[:, None]
    seen = seen.expand(B, T, S).clone()
    mask = None
    if masked:
        seen[1, :, :2] = False  # padding, with values that must not count
        values[1, :, :2] *= 50
        mask = torch.zeros(B, 1, T, S).masked_fill(~seen[:, None], float("-inf"))
    found = attend_int8(pairs, values, SCALE, mask, rows_at_once=2)
    # A share on the border of two codes may fall on either side: one step of a 255th of the largest share
    assert (found.double() - formula(pairs, values, seen)).abs().max() < 1.01 * float(values.abs().max()) / 255
    assert (found.double() - formula(pairs, values, seen)).abs().median() < 1e-5


@pytest.mark.parametrize("make", [grouped, latent])
def test_is_near_attention_and_takes_the_same_masks(make: object) -> None:
    pairs, values = make()  # type: ignore[operator]
    plain, rounded = (attend(pairs, values, SCALE, None, int8=int8) for int8 in (False, True))
    assert not torch.equal(plain, rounded)
    assert (plain - rounded).norm() < 0.03 * plain.norm()
    causal = causal_mask(T, S, values)[None, None].expand(B, 1, T, S)
    assert torch.equal(rounded, attend(pairs, values, SCALE, causal, int8=True))


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_v3_bf16", "tiny_v32"])
def test_a_model_runs_with_it(model: str, request: pytest.FixtureRequest) -> None:
    checkpoint = open_checkpoint(request.getfixturevalue(model))
    plain = Model.load(checkpoint)
    scheme = input_scheme({"method": "dynamic", "attention": True, "roles": []})
    tokens = torch.randint(0, 512, (2, 24), generator=torch.Generator().manual_seed(0))
    before, after = plain(tokens), Model(plain.family, plain.cfg, plain.weights, scheme)(tokens)
    apart = (before - after).norm(dim=-1) / before.norm(dim=-1)  # a token whose experts change is far apart
    assert 0 < float(apart.median()) < 0.05


def test_sinks_are_refused(tiny_v4: Path) -> None:
    checkpoint = open_checkpoint(tiny_v4)
    family = family_of(checkpoint.config)
    scheme = input_scheme({"method": "dynamic", "attention": True})
    with pytest.raises(DscError, match="products stay 16-bit here; leave attention out"):
        Model(family, family.parse(checkpoint.config), {}, scheme)

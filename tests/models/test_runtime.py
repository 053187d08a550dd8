"""The whole model: cache and padding change nothing, generation is the slow loop's, rounded inputs are applied."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.models.activations import input_scheme
from deepseek_compress.models.cache import KvCache
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.activations import round_tokens
from tests.models.reference import relative, transformers_model

BOUND = 2e-6
FAMILIES = ["tiny_v3", "tiny_v32", "tiny_v4", "tiny_v2", "tiny_qwen2", "tiny_qwen3", "tiny_llama"]
PROMPTS = [torch.randint(2, 512, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 3, 17, 9, 30)]


def slow_greedy(model: Model, prompt: list[int], limit: int, end: int) -> list[int]:
    """One prompt, the whole text again for each token."""
    tokens = list(prompt)
    for _ in range(limit):
        following = int(model.forward(torch.tensor([tokens]))[0, -1].argmax())
        if following == end:
            break
        tokens.append(following)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_logits_equal_transformers(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    tokens = torch.randint(0, 512, (2, 70), generator=torch.Generator().manual_seed(1))
    assert relative(Model.load(path).forward(tokens), transformers_model(path)(tokens).logits) < BOUND


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "tiny_v4"])  # V4 runs without a cache
@torch.no_grad()
def test_cache_and_left_padding_change_nothing(name: str, request: pytest.FixtureRequest) -> None:
    model = Model.load(request.getfixturevalue(name))
    width = max(map(len, PROMPTS))
    padding = torch.tensor([width - len(prompt) for prompt in PROMPTS])
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    cache = KvCache(model.cfg.num_hidden_layers, width)
    parts = [model.forward(piece, cache, padding) for piece in tokens.split([20, 1, 8, 1], dim=1)]
    padded = torch.cat(parts, dim=1)
    assert padded.isfinite().all()
    for row, prompt in enumerate(PROMPTS):
        assert relative(padded[row, width - len(prompt) :], model.forward(torch.tensor([prompt]))[0]) < BOUND


def test_generation_without_a_cache(tiny_v4: Path) -> None:
    model = Model.load(tiny_v4)
    assert model.generate(PROMPTS[:2], 3, eos=()) == [slow_greedy(model, prompt, 3, end=-1) for prompt in PROMPTS[:2]]


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "tiny_v4"])
def test_generation_is_the_slow_loop(name: str, request: pytest.FixtureRequest) -> None:
    model = Model.load(request.getfixturevalue(name))
    free = [slow_greedy(model, prompt, 12, end=-1) for prompt in PROMPTS]
    assert model.generate(PROMPTS, 12, eos=()) == free
    assert model.generate(PROMPTS, 12, eos=(), batch_size=2) == free
    end = free[0][4]  # an id that does come up: rows finish at different times and leave the batch
    stopped = [slow_greedy(model, prompt, 12, end) for prompt in PROMPTS]
    assert len({len(ids) for ids in stopped}) > 1
    assert model.generate(PROMPTS, 12, eos=end) == stopped


def test_the_models_own_end_is_the_default(tiny_qwen2: Path) -> None:
    model = Model.load(tiny_qwen2)
    assert model.generate(PROMPTS, 8) == model.generate(PROMPTS, 8, eos={2})
    assert model.generate([], 8) == []


@torch.no_grad()
def test_rounded_inputs(tiny_v3: Path) -> None:
    model = Model.load(tiny_v3)
    scheme = input_scheme({"method": "dynamic", "num_bits": 8, "granularity": "token", "roles": ["expert"]})
    assert scheme is not None
    rounded = Model(model.family, model.cfg, model.weights, scheme).blocks[1]
    x = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    expected = model.blocks[1].linear("mlp.experts.3.up_proj", round_tokens(x, 8, symmetric=True))
    assert torch.equal(rounded.linear("mlp.experts.3.up_proj", x), expected)
    kept = "self_attn.q_a_proj"
    assert torch.equal(rounded.linear(kept, x), model.blocks[1].linear(kept, x))
    assert input_scheme(None) is None


def test_gradients_reach_every_weight(tiny_v3: Path) -> None:
    model = Model.load(tiny_v3)
    leaves: dict[str, Tensor] = {name: value.requires_grad_() for name, value in model.weights.items()}
    tokens = torch.randint(0, 512, (4, 24), generator=torch.Generator().manual_seed(3))
    Model(model.family, model.cfg, leaves).forward(tokens).logsumexp(-1).sum().backward()
    without = {name for name, leaf in leaves.items() if leaf.grad is None or not leaf.grad.abs().sum() > 0}
    # the bias chooses experts and is balanced by hand: no gradient, by construction
    assert {name.rsplit(".", 1)[-1] for name in without} == {"e_score_correction_bias"}


def test_resolve() -> None:
    with pytest.raises(DscError, match="no such directory"):
        resolve_model("does/not/exist")
    with pytest.raises(DscError, match="no built-in model"):
        resolve_model("builtin:none")

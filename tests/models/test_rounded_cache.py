"""A cache of few bits: a text at once and token by token give the same, and what is rounded is what engines keep."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_compress.errors import DscError, Problems
from deepseek_compress.models.cache import KvCache, cache_bytes, kv_rounding
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.kv_cache import KvRounding
from tests.models.reference import relative

FAMILIES = ["tiny_v3", "tiny_v32", "tiny_v2", "tiny_qwen2", "tiny_llama"]
PROMPTS = [torch.randint(2, 512, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 3, 30)]
ROUNDINGS = [KvRounding(num_bits=4), KvRounding(num_bits=4, delta=True), KvRounding(num_bits=8, group_size=16)]


def loaded(path: Path, rounding: KvRounding | None) -> Model:
    """In float64: other sums of the same numbers then round to the same codes."""
    model = Model.load(path, torch.float64)
    return Model(model.family, model.cfg, model.weights, kv_cache=rounding)


@pytest.mark.parametrize("rounding", ROUNDINGS, ids=str)
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_cached_and_not_are_the_same(name: str, rounding: KvRounding, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    model = loaded(path, rounding)
    width = max(map(len, PROMPTS))
    padding = torch.tensor([width - len(prompt) for prompt in PROMPTS])
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    cache = model.cache(width)
    padded = torch.cat([model.forward(piece, cache, padding) for piece in tokens.split([20, 1, 8, 1], dim=1)], dim=1)
    exact = loaded(path, None)
    for row, prompt in enumerate(PROMPTS):
        whole = model.forward(torch.tensor([prompt]))[0]
        assert relative(padded[row, width - len(prompt) :], whole) < 2e-6
        assert relative(whole, exact.forward(torch.tensor([prompt]))[0]) > 1e-5, "rounding is felt"


def test_generation_keeps_the_last_key_of_rows_that_go_on(tiny_qwen2: Path) -> None:
    model = loaded(tiny_qwen2, KvRounding(num_bits=4, delta=True))
    free = model.generate(PROMPTS, 12, eos=())
    end = free[0][2]  # rows leave the batch at different times
    stopped = [ids[: ids.index(end)] if end in ids else ids for ids in free]
    assert len({len(ids) for ids in stopped}) > 1
    assert model.generate(PROMPTS, 12, eos=end) == stopped
    assert model.generate(PROMPTS, 12, eos=(), batch_size=1) == free


@torch.no_grad()
def test_latent_attention_rounds_its_latent(tiny_v3: Path) -> None:
    """The cache of an engine holds latent and rotated key: these are rounded, not what they are expanded to."""
    rounding = KvRounding(num_bits=4)
    model = loaded(tiny_v3, rounding)
    seen: list[torch.Tensor] = []
    weights = model.blocks[0]
    linear = weights.linear
    weights.linear = lambda name, x: (seen.append(x) if name.endswith("kv_b_proj") else None, linear(name, x))[1]  # type: ignore[method-assign,func-returns-value]
    model.forward(torch.tensor([PROMPTS[0]]))
    (latent,) = seen
    assert torch.equal(rounding(latent), latent)
    assert all(len(row.unique()) <= 16 for row in latent.reshape(-1, 64))


def test_bytes_of_a_token(tiny_v32: Path, tiny_qwen2: Path, tiny_v4: Path) -> None:
    rounding = KvRounding(num_bits=8)
    dense = Model.load(tiny_qwen2).cfg  # 2 blocks, 2 heads of 32 channels
    assert cache_bytes(dense, None) == (2 * 2 * 2 * 32 * 2, 2 * 2 * 2 * 32 * 2)
    assert cache_bytes(dense, rounding) == (512, 2 * 2 * 2 * (32 + 3))
    sparse = Model.load(tiny_v32).cfg  # 3 blocks: latent of 64, key of 32, and the indexer's key in 16 bits
    index = sparse.indexer.head_dim if sparse.indexer else 0
    assert cache_bytes(sparse, rounding) == (3 * 2 * (96 + index), 3 * (64 + 3 + 32 + 3 + 2 * index))
    assert cache_bytes(Model.load(tiny_v4).cfg, rounding) is None


def test_what_does_not_fit_is_one_line(tiny_qwen2: Path, tiny_v4: Path) -> None:
    with pytest.raises(DscError, match="heads of 32 channels do not divide into groups of 24; set group_size: 32"):
        loaded(tiny_qwen2, KvRounding(group_size=24))
    with pytest.raises(DscError, match="kv_cache: deepseek_v4 keeps entries of many tokens"):
        loaded(tiny_v4, KvRounding())
    with pytest.raises(Problems, match="num_bits"):
        kv_rounding({"num_bits": 5})
    assert kv_rounding(None) is None


def test_a_cache_without_memory_gives_back_what_it_gets() -> None:
    x = torch.randn(1, 2, 3, 4)
    assert KvCache(1, None).update(0, x)[0] is x

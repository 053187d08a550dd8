"""A cache that keeps some tokens, against the slow loop: what is dropped or read from 4 bits, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.models import kept_tokens
from deepseek_compress.models.cache import cache_bytes
from deepseek_compress.models.kept_tokens import KeptTokens
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.kv_cache import EVERY, KvRounding
from deepseek_compress.registry import build
from tests.models.reference import relative

FEW = 8  # tokens between two decisions, instead of EVERY
SCHEMES = [
    KvRounding(num_bits=16, window=4, sinks=2, important=3),
    KvRounding(num_bits=8, window=5, sinks=0),
    KvRounding(num_bits=8, window=3, sinks=1, important=2, rest=4, delta=True),
]
PROMPTS = [torch.randint(2, 512, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (9, 3, 30)]


def slow(
    q: Tensor, k: Tensor, v: Tensor, rest: tuple[Tensor, Tensor] | None, knobs: KvRounding
) -> tuple[Tensor, set[int]]:
    """q (heads, T, D) over one entry a token, k and v (T, D), token by token."""
    assert knobs.window is not None
    kept: set[int] = set()
    mass, outs = torch.zeros(len(k)), torch.zeros(len(q), len(k), v.shape[1])
    for t in range(len(k)):
        if t and t % FEW == 0:
            old = {s for s in kept if knobs.sinks <= s < t - knobs.window}
            kept -= old - set(sorted(old, key=lambda s: -float(mass[s]))[: knobs.important])
        kept.add(t)
        seen = [s for s in range(t + 1) if s in kept or rest is not None]
        keys = torch.stack([k[s] if s in kept or rest is None else rest[0][s] for s in seen])
        values = torch.stack([v[s] if s in kept or rest is None else rest[1][s] for s in seen])
        for h in range(len(q)):
            shares = torch.softmax(keys @ q[h, t] * 0.3, 0)
            outs[h, t] = shares @ values
            mass[seen] += shares
    return outs, kept


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_tokens, "EVERY", FEW)


@pytest.mark.parametrize("knobs", SCHEMES, ids=str)
@pytest.mark.usefixtures("few")
def test_the_loop_over_tokens_gives_the_same(knobs: KvRounding) -> None:
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(1, 4, 29, 16, generator=generator)  # four heads, two of the cache
    k, v, k4, v4 = (torch.randn(1, 2, 29, 16, generator=generator) for _ in range(4))
    rest = (k4, v4) if knobs.rest else None
    state = KeptTokens(knobs, 1, 2)
    coarse = None if rest is None else ([(q, rest[0])], rest[1])
    found = state.attend(torch.arange(29)[None], [(q, k)], v, 0.3, None, coarse)
    for g in range(2):
        heads = slice(2 * g, 2 * g + 2)
        want, kept = slow(q[0, heads], k[0, g], v[0, g], None if rest is None else (k4[0, g], v4[0, g]), knobs)
        torch.testing.assert_close(found[0, heads], want, rtol=1e-5, atol=1e-6)
        assert set(state.kept[0, g].nonzero()[:, 0].tolist()) == kept
        assert len(kept) < 29


@pytest.mark.parametrize("knobs", SCHEMES, ids=str)
@pytest.mark.parametrize("name", ["tiny_v2", "tiny_qwen2"])
@pytest.mark.usefixtures("few")
@torch.no_grad()
def test_a_text_at_once_and_in_pieces_are_the_same(
    name: str, knobs: KvRounding, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(name)
    exact = Model.load(path, torch.float64)
    model = Model(exact.family, exact.cfg, exact.weights, kv_cache=knobs)
    width = max(map(len, PROMPTS))
    padding = torch.tensor([width - len(prompt) for prompt in PROMPTS])
    tokens = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    cache = model.cache(width)
    padded = torch.cat([model.forward(piece, cache, padding) for piece in tokens.split([20, 1, 8, 1], dim=1)], dim=1)
    for row, prompt in enumerate(PROMPTS):
        whole = model.forward(torch.tensor([prompt]))[0]
        assert relative(padded[row, width - len(prompt) :], whole) < 2e-6
    assert relative(whole, exact.forward(torch.tensor([PROMPTS[2]]))[0]) > 1e-4, "tokens are missed"
    free = model.generate(PROMPTS, 12, eos=())
    assert model.generate(PROMPTS, 12, eos=(), batch_size=1) == free
    end = free[0][2]
    stopped = [ids[: ids.index(end)] if end in ids else ids for ids in free]
    assert model.generate(PROMPTS, 12, eos=end) == stopped


def test_two_layers_of_4_bits_are_as_good_as_8() -> None:
    x = torch.randn(2, 3, 5, 64, generator=torch.Generator().manual_seed(2))
    two = KvRounding(num_bits=8, window=1, rest=4)
    lost = [float((how(x) - x).square().mean()) for how in (two, KvRounding(num_bits=8), two.coarse)]
    assert lost[0] < 2 * lost[1] < 0.02 * lost[2]
    assert torch.equal(two.coarse(x), KvRounding(num_bits=4)(x))


def test_bytes_are_a_mean_over_the_text(tiny_qwen2: Path) -> None:
    how = KvRounding(num_bits=8, window=200, sinks=4, important=100, rest=4)
    kept = 200 + 4 + 100 + EVERY - 1
    assert how.bytes(64) == 2 * (32 + 2.5)
    assert how.mean_bytes(64, 1000) == (kept * 69 + (1000 - kept) * 34.5) / 1000
    assert how.mean_bytes(64, 100) == 69
    dropped = KvRounding(num_bits=16, window=100, sinks=0)
    assert dropped.mean_bytes(64, 1630) == 128 * (100 + EVERY - 1) / 1630
    cfg = Model.load(tiny_qwen2).cfg
    size = cache_bytes(cfg, dropped, 1630)
    assert size is not None
    assert size.stored == pytest.approx(size.plain / 10)


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"important": 3}, "go with a window"),
        ({"num_bits": 16}, "go with a window"),
        ({"num_bits": 4, "window": 5, "rest": 4}, "set num_bits: 8"),
        ({"window": 5, "delta": True}, "differences to tokens that are dropped"),
    ],
)
def test_what_makes_no_sense_is_refused(knobs: dict[str, Any], says: str) -> None:
    with pytest.raises(DscError, match=says):
        build(KvRounding, knobs, "kv_cache")


def test_a_model_that_chooses_tokens_itself_is_refused(tiny_v32: Path) -> None:
    model = Model.load(tiny_v32)
    with pytest.raises(DscError, match="by its own indexer"):
        Model(model.family, model.cfg, model.weights, kv_cache=SCHEMES[0])

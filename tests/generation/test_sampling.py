"""Drawing a token, against distributions worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_compress.errors import DscError
from deepseek_compress.generation.sampling import Sampler, Sampling, probabilities
from deepseek_compress.registry import build

LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


@pytest.mark.parametrize(
    ("knobs", "want"),
    [
        ({"temperature": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"temperature": 1.0, "top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.7}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 0.71}, [0, 4 / 9, 2 / 9, 3 / 9]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"temperature": 1.0, "top_p": 1e-9}, [0, 1, 0, 0]),
    ],
)
def test_the_distribution(knobs: dict[str, float], want: list[float]) -> None:
    assert np.allclose(probabilities(LOGITS, Sampling.model_validate(knobs)), want, atol=1e-6)


def test_draws_follow_it_and_repeat_with_the_seed() -> None:
    def draws(seed: int) -> list[int]:
        sampler = Sampler(Sampling(temperature=1.0, seed=seed))
        return [sampler(LOGITS) for _ in range(4000)]

    first = draws(1)
    assert np.abs(np.bincount(first, minlength=4) / 4000 - np.exp(LOGITS)).max() < 0.03
    assert first == draws(1)
    assert first != draws(2)


@given(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=40), st.integers(0, 5), st.floats(0.01, 1))
def test_it_never_draws_what_is_cut_off(logits: list[float], top_k: int, top_p: float) -> None:
    values, sampling = np.array(logits, np.float32), Sampling(temperature=0.7, top_k=top_k, top_p=top_p)
    p = probabilities(values, sampling)
    assert p.sum() == pytest.approx(1)
    assert 1 <= (p > 0).sum() <= (top_k or len(p))
    assert p[Sampler(sampling)(values)] > 0
    assert values[Sampler(Sampling())(values)] == values.max()


def test_a_wrong_knob_is_one_line() -> None:
    with pytest.raises(DscError, match=r"sampling\.top_p"):
        build(Sampling, {"top_p": 0}, "sampling")

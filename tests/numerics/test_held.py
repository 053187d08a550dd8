"""What is decided by held-back tokens: the strength of GPTAQ's correction, and whether scales move."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_compress.numerics.gptaq import DAMPINGS, validated
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.held_scales import HeldScales
from deepseek_compress.numerics.hessian import damped
from deepseek_compress.numerics.migration import SmoothQuant
from deepseek_compress.numerics.types import Statistics


def paired(noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, what the original feeds it and what the compressed model does; `noise` cannot be foreseen."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(160, 24, generator=generator)
    bent = x @ (torch.eye(24) + 0.1 * torch.randn(24, 24, generator=generator))
    return torch.randn(6, 24, generator=generator), x, bent + noise * torch.randn(160, 24, generator=generator)


def sums(original: Tensor, seen: Tensor, half: Statistics | None = None) -> Statistics:
    return Statistics(len(seen), seen.t() @ seen, cross_covariance=(original - seen).t() @ seen, half=half)


@pytest.mark.parametrize("noise", [0.02, 1.0])
def test_strength_and_damping_are_the_best_on_held_back_tokens(noise: float) -> None:
    weight, original, seen = paired(noise)
    given = sums(original, seen, sums(original[:80], seen[:80]))
    damping, strength = validated(weight, given, 0.005)

    def held(damping: float, strength: float) -> float:
        """The squared error of each half's outputs under the correction that the other gives, from the tokens."""
        total = 0.0
        for own, other in ((slice(80), slice(80, None)), (slice(80, None), slice(80))):
            x, y = seen[own], (original[own] - seen[own]) @ weight.t()
            correction = torch.linalg.solve(damped(x.t() @ x, damping), x.t() @ y).t()
            left = (original[other] - seen[other]) @ weight.t() - strength * seen[other] @ correction.t()
            total += float(left.square().sum())
        return total

    tried = {(d, s / 100): held(d, s / 100) for d in (0.005, *DAMPINGS) for s in range(101)}
    assert held(damping, strength) <= min(tried.values()) * 1.001
    assert (strength > 0.95) == (noise == 0.02)


def test_nothing_is_corrected_without_halves() -> None:
    weight, original, seen = paired(0.1)
    assert validated(weight, sums(original, seen), 0.01) == (0.01, 0.0)


def inputs(outlier: float) -> tuple[Statistics, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(512, 64, generator=generator)
    x[:, 5] *= outlier
    weights = [torch.randn(rows, 64, generator=generator) for rows in (24, 40)]
    half = Statistics(256, x[:256].t() @ x[:256])
    return Statistics(512, x.t() @ x, x.abs().amax(0), half=half), weights


def test_scales_move_only_where_held_back_tokens_gain() -> None:
    method = HeldScales(group_size=32)
    calm, weights = inputs(1.0)
    assert torch.equal(method.scales([method.kept(w) for w in weights], calm), torch.ones(64))
    wild, weights = inputs(60.0)
    found = method.scales([method.kept(w) for w in weights], wild)
    plain = SmoothQuant(alpha=0.5)
    other = SmoothQuant(alpha=0.25)
    choices = [m.scales([m.kept(w) for w in weights], wild) for m in (plain, other)]
    assert any(torch.equal(found, choice) for choice in choices)
    assert float(found[5]) > 2 * float(found.median())


def test_the_error_is_that_of_the_other_half() -> None:
    given, weights = inputs(20.0)
    assert given.half is not None
    assert given.half.hessian is not None
    assert given.hessian is not None
    method, rows = HeldScales(group_size=32), weights[0]
    scales = 1 + torch.rand(64, generator=torch.Generator().manual_seed(1))
    first, second = given.half.hessian, given.hessian - given.half.hessian
    total = 0.0
    for solving, judging in ((first, second), (second, first)):
        moved = Gptq(group_size=32)(rows * scales, Statistics(1, solving / torch.outer(scales, scales)))
        error = rows - moved.dequantize() / scales
        total += float(torch.trace(error @ judging @ error.t()))
    assert method._error(rows, scales, first, second) == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(("errors", "moves"), [((1.0, 0.98, 1.2), False), ((1.0, 0.98, 0.96), True)])
def test_scales_move_for_a_gain_that_is_no_noise(
    errors: tuple[float, ...], moves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = iter(errors)  # of nothing moved, then of each alpha
    monkeypatch.setattr(HeldScales, "_error", lambda *_: next(told))
    given, weights = inputs(60.0)
    method = HeldScales(group_size=32)
    found = method.scales([method.kept(w) for w in weights], given)
    last = SmoothQuant(alpha=method.alphas[-1]).scales([w.abs().amax(0, keepdim=True) for w in weights], given)
    assert torch.equal(found, last if moves else torch.ones(64))


def test_nothing_moves_without_halves() -> None:
    given, weights = inputs(60.0)
    method = HeldScales(group_size=32)
    found = method.scales([method.kept(w) for w in weights], given._replace(half=None))
    assert torch.equal(found, torch.ones(64))

"""The other methods against their formulas, spelled out on the inputs themselves rather than on the Hessian."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from deepseek_compress.numerics import grid, hessian
from deepseek_compress.numerics.awq import Awq, migration
from deepseek_compress.numerics.gptaq import corrected
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.hessian import add_gram, damped, factorize, layer_error, mirror
from deepseek_compress.numerics.hqq import Hqq
from deepseek_compress.numerics.learned import Learned
from deepseek_compress.numerics.magnitude import Magnitude
from deepseek_compress.numerics.quantease import QuantEase, refine
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Quantized, Statistics
from tests.numerics.reference import correlated


def plain_sweep(weight: Tensor, start: Quantized, h: Tensor) -> Tensor:
    """One sweep of coordinate descent in float64: every candidate's error taken in full, one weight at a time."""
    size, h = start.group_size, h.double()
    result = start.dequantize().double()
    for row in range(len(weight)):
        w, q = weight[row].double(), result[row]
        for g in range(start.scale.shape[1]):
            scale, zero = float(start.scale[row, g]), float(start.zero_point[row, g])
            for j in range(g * size, g * size + size):
                errors = []
                for code in range(16):
                    q[j] = (code - zero) * scale
                    errors.append(float((w - q) @ h @ (w - q)))
                q[j] = (errors.index(min(errors)) - zero) * scale
            codes = torch.zeros_like(q)
            codes[g * size : g * size + size] = q[g * size : g * size + size] / scale
            fresh = scale + float(codes @ h @ (w - q)) / float(codes @ h @ codes)
            other = q + codes * (float(torch.tensor(fresh).bfloat16()) - scale)
            if float((w - other) @ h @ (w - other)) < float((w - q) @ h @ (w - q)):
                q.copy_(other)
    return result


def test_coordinate_descent_is_the_plain_one() -> None:
    weight, h = correlated(4, 64)
    h = damped(h, 0.01)
    start = Rtn(group_size=32)(weight, Statistics())
    fast = refine(weight, start, h, 1).dequantize().double()
    slow = plain_sweep(weight, start, h)
    assert torch.allclose(fast, slow, rtol=1e-5, atol=1e-6)


def test_each_sweep_lowers_the_error() -> None:
    weight, h = correlated(16, 128)
    start = Gptq(group_size=32, damping=0.01)(weight, Statistics(1, h))
    errors = [layer_error(weight, start.dequantize(), damped(h, 0.01))]
    for sweeps in (1, 2, 4):
        errors.append(layer_error(weight, refine(weight, start, damped(h, 0.01), sweeps).dequantize(), damped(h, 0.01)))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.95 * errors[0]


def test_quantease_keeps_sparsity_and_beats_gptq() -> None:
    weight, h = correlated(16, 128)
    sparse = Magnitude()(weight, Statistics())
    by_gptq = Gptq(group_size=32)(sparse, Statistics(1, h)).dequantize()
    by_both = QuantEase(group_size=32)(sparse, Statistics(1, h)).dequantize()
    assert bool((by_both[sparse == 0] == 0).all())
    assert layer_error(sparse, by_both, damped(h, 0.01)) < layer_error(sparse, by_gptq, damped(h, 0.01))


def test_corrected_target_is_the_least_squares_solution() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(500, 24, generator=generator)
    seen = original + 0.1 * torch.randn(500, 24, generator=generator)
    lost = 0.1 * seen @ torch.randn(24, 5, generator=generator) + 0.1 * torch.randn(500, 5, generator=generator)
    weight = torch.randn(5, 24, generator=generator)
    factor = factorize(seen.t() @ seen, torch.randperm(24, generator=generator), 0.0)
    statistics = Statistics(500, cross_covariance=(original - seen).t() @ seen)
    best = torch.linalg.lstsq(seen, original @ weight.t()).solution.t()
    assert torch.allclose(corrected(weight, statistics, factor, 1.0), best, atol=1e-5)
    assert torch.allclose(corrected(weight, statistics, factor, 0.5), (weight + best) / 2, atol=1e-5)
    owing = statistics._replace(residual_covariance=lost.t() @ seen)
    best = torch.linalg.lstsq(seen, original @ weight.t() + lost).solution.t()
    assert torch.allclose(corrected(weight, owing, factor, 1.0), best, atol=1e-5)
    sparse = Magnitude()(weight, Statistics())
    assert bool((corrected(sparse, owing, factor, 0.5)[sparse == 0] == 0).all())


def test_awq_takes_the_range_with_the_least_output_error() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 64, generator=generator) * torch.exp(torch.randn(64, generator=generator))
    weight = torch.randn(3, 64, generator=generator) ** 3
    result = Awq(group_size=32, steps=5, damping=0.0)(weight, Statistics(200, x.t() @ x)).dequantize()
    for row in range(3):
        for g in range(2):
            part, own = slice(g * 32, g * 32 + 32), x[:, g * 32 : g * 32 + 32]
            w, errors = weight[row, part], []
            for shrink in (1, 0.9, 0.8, 0.7, 0.6, 0.5):
                one = grid.fit(w.min()[None] * shrink, w.max()[None] * shrink, 4, False)
                q = (w / one.scale).round().clamp(-one.zero_point, 15 - one.zero_point) * one.scale
                errors.append(float((own @ (w - q)).square().sum()))
            assert float((own @ (w - result[row, part])).square().sum()) == pytest.approx(min(errors), rel=1e-4)


def test_migration_finds_the_channels_that_matter() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = torch.ones(64)
    sizes[::8] = 30.0
    x = torch.randn(400, 64, generator=generator) * sizes
    weight = torch.randn(16, 64, generator=generator)
    statistics = Statistics(400, x.t() @ x, input_absmean=x.abs().mean(0))
    scales = migration([weight], statistics, Rtn(group_size=32))
    assert bool((scales[::8] > 1.5 * scales[1::8]).all())
    plain = layer_error(weight, Rtn(group_size=32)(weight, statistics).dequantize(), x.t() @ x)
    moved = Rtn(group_size=32)(weight * scales, statistics).dequantize() / scales
    assert layer_error(weight, moved, x.t() @ x) < 0.7 * plain


def test_awq_scales_are_those_with_the_least_error_on_the_inputs() -> None:
    """Each alpha in turn; what it loses is taken on the inputs as they come, with the scales undone."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 32, generator=generator) * torch.exp(1.5 * torch.randn(32, generator=generator))
    weights = [torch.randn(8, 32, generator=generator) for _ in range(2)]
    statistics, errors, tried = Statistics(300, x.t() @ x, input_absmean=x.abs().mean(0)), [], []
    for step in range(6):
        scales = x.abs().mean(0) ** (step / 6)
        scales = scales / (scales.max() * scales.min()).sqrt()
        moved = [Rtn(group_size=32)(w * scales, statistics).dequantize() / scales for w in weights]
        errors.append(sum(float((x @ (w - q).T).square().sum()) for w, q in zip(weights, moved, strict=True)))
        tried.append(scales)
    best = errors.index(min(errors))
    assert 0 < best < 5, "neither nothing moved nor everything"
    torch.testing.assert_close(migration(weights, statistics, Rtn(group_size=32), steps=6), tried[best])


def test_hqq_lowers_its_own_norm_where_there_are_outliers() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(16, 128, generator=generator)
    weight[:, ::40] *= 8
    plain, found = (m(group_size=64)(weight, Statistics()).dequantize() for m in (Rtn, Hqq))
    losses = [(weight - value).abs().pow(0.7).sum(1) for value in (plain, found)]
    assert bool((losses[1] <= losses[0] * 1.0001).all())
    assert float(losses[1].sum()) < 0.97 * float(losses[0].sum())


def test_magnitude_keeps_the_two_largest_of_each_four_of_a_row() -> None:
    weight = torch.tensor([[1.0, -4.0, 3.0, 2.0, -5.0, 0.5, -0.25, 1.0], [0.0, 1.0, -2.0, -3.0, 7.0, 8.0, -9.0, 6.0]])
    kept = [[0.0, -4.0, 3.0, 0.0, -5.0, 0.0, 0.0, 1.0], [0.0, 0.0, -2.0, -3.0, 0.0, 8.0, -9.0, 0.0]]
    assert Magnitude()(weight, Statistics()).tolist() == kept


@pytest.mark.parametrize("shift", [-1, 0, 2])
def test_hqq_fits_zero_point_and_scale_to_values_that_moved_as_one(shift: int) -> None:
    codes = torch.tensor([-5.0, -2.0, 0.0, 3.0, 6.0])[:, None]  # relative to a zero point of 7
    now = grid.Grid(torch.tensor([0.5]), torch.tensor([7.0]), 15)
    found = Hqq()._fit((codes - shift) * 0.5, codes, now)
    assert (float(found.zero_point), float(found.scale)) == (7 + shift, 0.5)


@pytest.mark.parametrize("symmetric", [False, True])
def test_straight_through_gradients(symmetric: bool) -> None:
    """By hand for one group: inside the range dQ/ds is the rounding error in steps, outside the end of the range."""
    group = torch.tensor([-1.0, -0.31, 0.0, 0.12, 0.47, 2.0])[None, :, None]  # (groups, group_size, rows)
    offset, shrink = torch.zeros_like(group).requires_grad_(), torch.full((2, 1, 1), 0.8).requires_grad_()
    values, now = Learned(symmetric=symmetric)._values(group, offset, shrink)
    by_offset, by_shrink = torch.autograd.grad(values.sum(), (offset, shrink))
    s, z = float(now.scale.detach()), float(now.zero_point.detach())
    steps = [float(w) / s for w in group.flatten()]
    inside = [-z <= round(w) <= 15 - z for w in steps]
    assert by_offset.flatten().tolist() == pytest.approx([s * i for i in inside])
    assert inside == [symmetric, True, True, True, True, False]
    error = sum(round(w) - w for w, i in zip(steps, inside, strict=True) if i)
    if symmetric:  # s = 0.8 * 2 / 7 from the upper side alone; the clipped weight is 7 s
        assert by_shrink.flatten().tolist() == pytest.approx([0, (error + 7) * 2 / 7], rel=1e-4)
    else:  # clipped: -z s and (15 - z) s, z = round(0.8 / s) passing its gradient through
        ends = 2 * (0.8 / s - z)
        by_low, by_high = -1 + (error + ends) * (1 / 15), 2 + (error + ends) * (2 / 15)
        assert by_shrink.flatten().tolist() == pytest.approx([by_low, by_high], rel=1e-4)


def test_learned_rounding_goes_below_its_start() -> None:
    weight, h = correlated(16, 128)
    errors = [
        layer_error(weight, Learned(group_size=32, iterations=n)(weight, Statistics(1, h)).dequantize(), h)
        for n in (1, 20, 100)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]


def test_learned_rounding_is_sign_descent_in_steps_that_fall_to_zero() -> None:
    weight, h = correlated(4, 64)
    iterations, matrix = 7, damped(h, 0.01)
    method = Learned(group_size=64, iterations=iterations)
    groups = weight.t()[None].contiguous()  # one group: (1, columns, rows)
    offset, shrink = torch.zeros_like(groups), torch.ones(2, 1, 4)
    best, lowest = torch.zeros_like(weight), torch.full((4,), torch.inf)
    for left in range(iterations, -1, -1):
        moving = (offset.requires_grad_(), shrink.requires_grad_())
        off = method._values(groups, *moving)[0][0] - weight.t()  # (columns, rows)
        losses = (off * (matrix @ off)).sum(0)
        gradients = torch.autograd.grad(losses.sum(), moving)
        wins = losses.detach() < lowest
        best[wins], lowest[wins] = (weight.t() + off.detach()).t()[wins], losses.detach()[wins]
        step = left / iterations**2
        bounds = ((-0.5, 0.5), (0.5, 1.0))
        offset, shrink = (
            (value.detach() - step * by.sign()).clamp(*bound)
            for value, by, bound in zip(moving, gradients, bounds, strict=True)
        )
    torch.testing.assert_close(method(weight, Statistics(1, h)).dequantize(), best, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("columns", [64, 576, 300])
def test_gram_is_the_product(columns: int) -> None:
    x = torch.randn(50, columns, generator=torch.Generator().manual_seed(0))
    result = mirror(add_gram(None, x))
    assert torch.allclose(result, x.t() @ x, rtol=1e-4, atol=1e-4)
    assert torch.equal(result, result.t())


def test_a_gram_of_bf16_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU computes it: within 2^-15 of the magnitudes, in two takes."""
    monkeypatch.setattr(hessian, "in_parts", lambda x: True)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(700, 450, generator=generator) * torch.logspace(-3, 3, 450)
    x[:, 17] = 0.0
    total = add_gram(add_gram(None, x[:300]), x[300:])
    wide = x.double()
    expected, size = wide.T @ wide, wide.abs().T @ wide.abs()
    apart = (mirror(total).double() - expected).abs()
    assert bool((apart <= 2**-15 * size).all())
    assert total[17].count_nonzero() == 0
    one = x[:1].bfloat16().double()
    first = wide[:1].T @ wide[:1]
    assert bool(((one.T @ one - first).abs() > 2**-9 * first.abs()).any()), "one part would not do"
    apart = (mirror(add_gram(None, x[:1])).double() - first).abs()
    assert bool((apart <= 2**-15 * first.abs()).all())


def test_the_parts_are_what_they_say() -> None:
    x = torch.tensor([[1.0 + 2**-9 + 2**-20]])
    left, right = hessian.parts(x)
    assert left.dtype == right.dtype == torch.bfloat16
    assert left.flatten().tolist() == [1.0, 1.0, 2**-9]
    assert right.flatten().tolist() == [1.0, 2**-9, 1.0]
    assert not hessian.in_parts(x), "on the CPU nothing changes"

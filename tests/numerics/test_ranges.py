"""Range estimators beside slow references, NVIDIA ModelOpt's calibrators and PyTorch's observers, by value."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.numerics import ACTIVATIONS, ranges
from deepseek_compress.numerics.activations import InputGrid, Static
from deepseek_compress.numerics.ranges import BINS, ESTIMATORS, Observer, Seen, divergence, squared_error
from deepseek_compress.registry import pick


def inputs(tokens: int = 400, seed: int = 0) -> Tensor:
    """(tokens, 16) with heavy tails, one channel that stands out and more above zero than below."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16, generator=generator) * torch.randn(tokens, 16, generator=generator).exp()
    x[:, 3] *= 8
    return torch.where(x < 0, x / 3, x)


def observed(x: Tensor, name: str = "percentile", batches: int = 3) -> Seen:
    observer = ESTIMATORS[name]().observer()
    for part in x.chunk(batches):
        observer.add(part)
    return observer.seen()


# ---- the histogram


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20), min_size=1, max_size=5))
def test_the_histogram_is_the_same_in_whatever_batches(values: list[list[float]]) -> None:
    apart, together = Observer(True), Observer(True)
    for batch in sorted(values, reverse=True):
        apart.add(torch.tensor(batch)[:, None])
    everything = torch.tensor([value for batch in values for value in batch])
    together.add(everything[:, None])
    one, other = apart.seen(), together.seen()
    assert (one.low, one.high, one.width) == (other.low, other.high, other.width)
    assert one.counts is not None and other.counts is not None
    assert torch.equal(one.counts, other.counts)
    want = [0] * BINS  # one value at a time
    for value in everything.tolist():
        want[int(abs(value) / one.width)] += 1
    assert one.counts.tolist() == want
    assert one.largest < BINS * one.width
    assert one.largest >= BINS // 2 * one.width or one.largest < 1e-30


def test_nan_and_infinity_are_seen() -> None:
    for bad in (math.nan, math.inf, -math.inf):
        for share in (None, 0.1):
            observer = Observer(True, share)
            for value in (2.0, bad, 3.0):
                observer.add(torch.tensor([[1.0, value]]))
            assert not math.isfinite(observer.seen().low)


def test_moving_averages_are_those_of_pytorch() -> None:
    theirs = torch.ao.quantization.MovingAverageMinMaxObserver(averaging_constant=0.1)
    observer = ESTIMATORS["moving_average"]().observer()
    for part in inputs().chunk(7):
        theirs(part)
        observer.add(part)
    found = observer.seen()
    assert found.low == pytest.approx(float(theirs.min_val), rel=1e-6)
    assert found.high == pytest.approx(float(theirs.max_val), rel=1e-6)


def test_of_one_batch_the_average_is_its_range() -> None:
    x = inputs()
    assert observed(x, "moving_average", 1)[:2] == observed(x, "minmax", 1)[:2] == (float(x.min()), float(x.max()))


# ---- NVIDIA ModelOpt


def calibrator(seen: Seen, bins: int):  # type: ignore[no-untyped-def]
    """ModelOpt's, with this histogram."""
    from modelopt.torch.quantization.calib import HistogramCalibrator

    assert seen.counts is not None
    found = HistogramCalibrator(num_bins=bins)
    found._calib_hist = seen.counts[:bins].numpy().copy()
    found._calib_bin_edges = np.arange(bins + 1) * seen.width
    return found


def narrow(bins: int = 512) -> Seen:
    """A histogram of few bins: theirs tries every one."""
    observer = Observer(True)
    observer.add(inputs(4000))
    seen = observer.seen()
    assert seen.counts is not None
    counts = seen.counts.view(bins, -1).sum(1)
    wide = torch.cat((counts, counts.new_zeros(BINS - bins)))
    return seen._replace(counts=wide, width=seen.width * BINS / bins)


def test_min_max_is_modelopts_maximum() -> None:
    from modelopt.torch.quantization.calib import MaxCalibrator

    x, theirs = inputs(), MaxCalibrator()
    for part in x.chunk(3):
        theirs.collect(part)
    assert Static().ends(observed(x, "minmax"))[1] == float(theirs.compute_amax())


@pytest.mark.parametrize("share", [90.0, 99.0, 99.9, 99.99, 100.0])
def test_percentile_is_modelopts_within_a_bin(share: float) -> None:
    x = inputs(2000)
    seen = observed(x)
    found = ESTIMATORS["percentile"](percentile=share).threshold(seen, 8, True)
    theirs = float(calibrator(seen, BINS).compute_amax("percentile", percentile=share))
    assert abs(found - theirs) <= seen.width * 1.001
    kept = float((x.abs() <= found).float().mean())
    assert kept >= share / 100
    assert found <= seen.largest


def test_the_squared_error_is_least_where_modelopt_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from modelopt.torch.quantization.calib import histogram

    def meant(x: Tensor, amax: Tensor, num_bits: int, unsigned: bool) -> Tensor:
        return rounds(x, amax, None, num_bits, unsigned)  # type: ignore[no-any-return]

    # ModelOpt 0.47 passes the number of bits where a bias has come to stand, and then rounds everything to one value
    rounds = histogram.fake_tensor_quant
    monkeypatch.setattr(histogram, "fake_tensor_quant", meant)
    seen = narrow()
    theirs = float(calibrator(seen, 512).compute_amax("mse"))
    tried = [(i + 0.5) * seen.width for i in range(128, 512)]
    best = min(tried, key=lambda t: squared_error(seen, t, t / 127))
    assert best == pytest.approx(theirs, rel=1e-6)
    found = ESTIMATORS["mse"]().threshold(seen, 8, True)
    least = squared_error(seen, theirs, theirs / 127)
    assert squared_error(seen, found, found / 127) <= 1.02 * least, "the thresholds tried are close enough"


def test_the_divergence_is_least_where_modelopt_has_it() -> None:
    seen = narrow()
    theirs = float(calibrator(seen, 512).compute_amax("entropy"))
    losses = [divergence(seen, bins, 128) for bins in range(128, 513)]
    last = max(i for i, loss in enumerate(losses) if loss == min(losses))
    assert (128 + last) * seen.width == pytest.approx(theirs, rel=1e-6)


# ---- against formulas


@pytest.mark.parametrize("bins", [200, 700, 4096])
@pytest.mark.parametrize("levels", [128, 190])
def test_divergence_against_loops(bins: int, levels: int) -> None:
    seen = observed(inputs(2000))
    assert seen.counts is not None
    counts = [float(count) for count in seen.counts]
    counts[0] = counts[1]
    q = [0.0] * bins
    for level in range(levels):
        members = [i for i in range(bins) if i * levels // bins == level and counts[i] > 0]
        for i in members:
            q[i] = sum(counts[j] for j in members) / len(members)
    p = counts[:bins]
    p[-1] += sum(counts[bins:])
    want = 0.0
    for one, other in zip(p, q, strict=True):
        if one > 0:
            want += math.inf if other == 0 else one / sum(p) * math.log((one / sum(p)) / (other / sum(q)))
    assert divergence(seen, bins, levels) == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_squared_error_is_that_of_the_values(symmetric: bool) -> None:
    x = inputs(3000)
    seen = observed(x)
    for part in (1.0, 0.7, 0.3):
        threshold = part * seen.largest
        low, high = seen.clipped(threshold, symmetric)
        step = seen.step(threshold, 8, symmetric)
        on_grid = (x.double().clamp(low, high) / step).round() * step
        want = float((on_grid - x).square().sum())
        assert squared_error(seen, threshold, step) == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mean_square_leaves_the_least_error_of_all(symmetric: bool) -> None:
    x = inputs(3000)
    error = {}
    for name in ESTIMATORS:
        method = Static.model_validate({"symmetric": symmetric, "estimator": name})
        error[name] = float((method.grid(*method.ends(observed(x, name)))(x) - x).square().sum())
    assert error["mse"] <= min(error.values()) * 1.01
    assert error["mse"] < error["minmax"]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_each_estimator_in_the_corners(name: str, symmetric: bool) -> None:
    method = pick(ACTIVATIONS, {"static": {"symmetric": symmetric, "estimator": name}}, "activations")
    assert isinstance(method, Static)
    for x in (torch.zeros(8, 4), torch.ones(8, 4), -torch.ones(3, 4), torch.full((1, 1), 3e-5), inputs()):
        observer = method.estimator.observer()
        observer.add(x)
        low, high = method.ends(observer.seen())
        grid = method.grid(low, high)
        assert low <= 0 <= high
        assert grid.scale > 0
        assert torch.equal(grid(torch.zeros(2)), torch.zeros(2)), "zero stays zero"
        if len(x.unique()) == 1:  # its own largest value is what a grid must hold
            torch.testing.assert_close(grid(x), x, rtol=0.01, atol=0)
    assert Static.model_validate(method.model_dump(mode="json")) == method, "a manifest gives it back"


def test_a_wrong_estimator_is_told() -> None:
    with pytest.raises(DscError, match=r"unknown estimator 'minmx'; did you mean 'minmax'"):
        pick(ACTIVATIONS, {"static": {"estimator": "minmx"}}, "activations")
    with pytest.raises(DscError, match=r"percentile\.percentile: .*less than or equal to 100"):
        pick(ACTIVATIONS, {"static": {"estimator": {"percentile": {"percentile": 200}}}}, "activations")


def test_every_estimator_has_its_source() -> None:
    assert all(kind.paper and kind.__doc__ for kind in ranges.ESTIMATORS.values())


# ---- the grid


@settings(max_examples=150, deadline=None)
@given(
    st.floats(-1e3, 1e3, width=32),
    st.floats(-1e3, 1e3, width=32),
    st.booleans(),
    st.lists(st.floats(-2e3, 2e3, width=32), min_size=1, max_size=30),
)
def test_the_grid_is_compressed_tensors_own(one: float, other: float, symmetric: bool, values: list[float]) -> None:
    grid = InputGrid.over(min(one, other), max(one, other), 8, symmetric)
    x = torch.tensor(values)
    args = QuantizationArgs(num_bits=8, type="int", symmetric=symmetric, strategy="tensor", dynamic=False)
    scale, zero = torch.tensor([grid.scale]), torch.tensor([grid.zero_point], dtype=torch.int8)
    assert torch.equal(grid(x), fake_quantize(x, scale, zero, args))
    assert float(torch.tensor(grid.scale).bfloat16()) == grid.scale
    inside = x.clamp(min(one, other, 0.0), max(one, other, 0.0))
    top = max(abs(one), abs(other))
    assert float((grid(inside) - inside).abs().max()) <= grid.scale * 1.01 + top * 2**-8, "a step, and BF16's"

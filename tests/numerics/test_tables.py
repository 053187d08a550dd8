"""Every entry of the tables, with its own defaults and in the corners."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from pydantic import ValidationError

from deepseek_compress.numerics import ACTIVATIONS, MIGRATION, SPARSITY, WEIGHTS
from deepseek_compress.numerics.activations import Dynamic
from deepseek_compress.numerics.hessian import layer_error
from deepseek_compress.numerics.modelopt import ModelOptMax
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Quantized, Statistics, WeightQuantizer
from tests.numerics.reference import correlated


def statistics(h: torch.Tensor) -> Statistics:
    drift = 0.02 * h @ torch.randn(len(h), len(h), generator=torch.Generator().manual_seed(9)) / len(h) ** 0.5
    return Statistics(4 * len(h), h, h.diagonal().sqrt(), h.diagonal().sqrt() / 2, drift)


def nearest(method: WeightQuantizer, weight: torch.Tensor) -> torch.Tensor:
    """What no method with these knobs may be worse than. ModelOpt's grids reach as far down as up: a little coarser."""
    kind = ModelOptMax if isinstance(method, ModelOptMax) else Rtn
    knobs = {"num_bits": method.num_bits, "group_size": method.group_size, "symmetric": method.symmetric}
    return kind(**knobs)(weight, Statistics()).dequantize()


def same(a: Quantized, b: Quantized) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True)) and a[3:] == b[3:]


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_with_defaults(name: str) -> None:
    weight, h = correlated(24, 256)
    weight_before, h_before, method, given = weight.clone(), h.clone(), WEIGHTS[name](), statistics(h)
    result = method(weight, given)
    assert result.codes.shape == (24, 256)
    assert result.codes.dtype == torch.uint8
    assert result.scale.shape == result.zero_point.shape == (24, 2)
    assert torch.equal(result.scale, result.scale.bfloat16().float())
    assert bool(result.scale.isfinite().all())
    assert torch.equal(weight, weight_before), "inputs are not modified"
    assert torch.equal(h, h_before), "inputs are not modified"
    assert same(result, WEIGHTS[name]()(weight, given)), "same bits twice"
    assert same(result, method(weight, method.prepare(given))), "prepared or not"
    if "cross_covariance" not in method.needs:  # those aim at another target
        plain = nearest(method, weight)
        assert layer_error(weight, result.dequantize(), h) <= layer_error(weight, plain, h) * 1.0001


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_all_widths(name: str, bits: int, symmetric: bool) -> None:
    weight, h = correlated(16, 128, seed=bits)
    if issubclass(WEIGHTS[name], ModelOptMax) and not symmetric:
        with pytest.raises(ValidationError, match="no zero points"):
            WEIGHTS[name](symmetric=False)
        return
    method = WEIGHTS[name](num_bits=bits, group_size=32, symmetric=symmetric)
    result = method(weight, statistics(h))
    assert int(result.codes.max()) < 2**bits
    assert result.num_bits == bits
    assert result.symmetric == symmetric
    assert not symmetric or bool((result.zero_point == 2 ** (bits - 1)).all())
    if "cross_covariance" not in WEIGHTS[name].needs:
        plain = nearest(method, weight)
        assert layer_error(weight, result.dequantize(), h) <= layer_error(weight, plain, h) * 1.0001


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("sparsity", SPARSITY)
def test_zeros_of_two_of_four_survive(sparsity: str, weights: str) -> None:
    weight, h = correlated(24, 128, seed=1)
    given = statistics(h)
    sparse = SPARSITY[sparsity]()(weight, given)
    assert bool(((sparse == 0).view(24, -1, 4).sum(-1) == 2).all()), "exactly two of four"
    assert torch.equal(sparse, SPARSITY[sparsity]()(weight, SPARSITY[sparsity]().prepare(given)))
    result = WEIGHTS[weights](group_size=32)(sparse, given)
    assert bool((result.dequantize()[sparse == 0] == 0).all())


def test_second_order_pruning_beats_magnitude() -> None:
    weight, h = correlated(24, 128)
    errors = [layer_error(weight, SPARSITY[name]()(weight, statistics(h)), h) for name in ("magnitude", "sparsegpt")]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("name", WEIGHTS)
def test_degenerate_weights(name: str) -> None:
    """Zeros, one value, one outlier, an unreached linear: finite, and exact where the grid can be."""
    _, h = correlated(1, 64)
    weight = torch.zeros(4, 64)
    weight[1], weight[2, 5], weight[3] = 0.5, 1e4, torch.linspace(-1, 1, 64)
    for hessian in (h, torch.zeros_like(h)):
        result = WEIGHTS[name](group_size=64)(weight, statistics(hessian))
        assert bool(result.dequantize().isfinite().all())
        assert bool((result.dequantize()[0] == 0).all())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_dynamic_activations(symmetric: bool, bits: int) -> None:
    method = Dynamic(num_bits=bits, symmetric=symmetric)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5)[None, :, None]
    x[0, 0] = 0
    y = method(x)
    assert torch.equal(y, method(x))
    assert y.dtype == x.dtype
    assert torch.equal(y[0, 0], x[0, 0])
    span = 2 * x.abs().amax(-1) if symmetric else x.amax(-1).clamp(min=0) - x.amin(-1).clamp(max=0)
    step = span / (2**bits - (2 if symmetric else 1))
    assert bool(((y - x).abs() <= step[..., None] * (0.5 if symmetric else 1.0) + 1e-9).all())
    assert all(len(set(token.tolist())) <= 2**bits for token in y.view(-1, 64))
    half = x.bfloat16()
    assert method(half).dtype == torch.bfloat16


@pytest.mark.parametrize("table", [WEIGHTS, SPARSITY, ACTIVATIONS, MIGRATION])
def test_each_entry_says_what_it_is_and_where_it_is_from(table: dict[str, type]) -> None:
    for name, entry in table.items():
        first = (entry.__doc__ or "").strip().splitlines()[0]
        assert len(first) > 20, name
        assert entry.paper, name


def test_importing_the_tables_is_light() -> None:
    heavy = ("transformers", "onnx", "scipy", "modelopt")
    code = f"import sys, deepseek_compress.numerics; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

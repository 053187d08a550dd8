"""NVIDIA ModelOpt as a method: what comes out is what ModelOpt itself makes of the linear and the text."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deepseek_compress.errors import DscError
from deepseek_compress.numerics.modelopt import LOADED, ModelOptAwqClip, ModelOptAwqLite, ModelOptMax, root
from deepseek_compress.numerics.types import Statistics, WeightQuantizer
from deepseek_compress.pipeline import Options, plan, run
from deepseek_compress.recipe import parse_recipe

ROWS, COLUMNS, GROUP, TOKENS = 24, 96, 32, 64


@pytest.fixture(scope="module")
def layer() -> tuple[nn.Linear, Tensor, Statistics]:
    """A linear, what it is fed (TOKENS, COLUMNS), of very different sizes, and what our calibration keeps of that."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, COLUMNS, generator=generator) * torch.exp(torch.randn(COLUMNS, generator=generator))
    linear = nn.Linear(COLUMNS, ROWS, bias=False).requires_grad_(False)
    linear.weight.copy_(torch.randn(ROWS, COLUMNS, generator=generator) ** 3)
    return linear, x, Statistics(TOKENS, x.t() @ x, input_absmean=x.abs().mean(0))


def by_modelopt(linear: nn.Linear, x: Tensor, algorithm: str, bits: int = 4) -> Any:
    """As its documentation has it: quantise a copy, calibrated by a loop over the text."""
    import modelopt.torch.quantization as mtq

    config = copy.deepcopy(mtq.INT4_AWQ_CFG)
    for entry in config["quant_cfg"]:
        if "block_sizes" in entry.get("cfg", {}):
            entry["cfg"] |= {"num_bits": bits, "block_sizes": {-1: GROUP}}
    config["algorithm"] = algorithm
    return mtq.quantize(copy.deepcopy(linear), config, lambda net: net(x))


def on_stored_scales(weight: Tensor, amax: Tensor, bits: int) -> Tensor:
    """Every weight to the nearest of ModelOpt's values, the step rounded to BF16, one group after the other."""
    top, result = 2 ** (bits - 1) - 1, weight.clone().view(-1, GROUP)
    for group, largest in zip(result, amax.flatten(), strict=True):
        step = (largest / top).bfloat16().float()
        group.copy_((group / step).round().clamp(-top - 1, top) * step)
    return result.view_as(weight)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize(("kind", "algorithm"), [(ModelOptMax, "max"), (ModelOptAwqClip, "awq_clip")])
def test_weights_are_what_modelopt_makes_of_the_text(
    layer: tuple[nn.Linear, Tensor, Statistics], kind: type[WeightQuantizer], algorithm: str, bits: int
) -> None:
    linear, x, statistics = layer
    ours, top = kind(num_bits=bits, group_size=GROUP)(linear.weight, statistics), 2 ** (bits - 1) - 1
    theirs = by_modelopt(linear, x, algorithm, bits).weight_quantizer
    assert torch.allclose(ours.scale.flatten(), theirs.amax.flatten() / top, rtol=2**-8)
    assert torch.allclose(ours.dequantize(), on_stored_scales(linear.weight, theirs.amax, bits), rtol=1e-5)
    theirs.amax = (ours.scale * top).view_as(theirs.amax)  # with the scale as it is stored
    assert torch.allclose(ours.dequantize(), theirs(linear.weight), rtol=1e-5)


def test_awq_clip_does_clip(layer: tuple[nn.Linear, Tensor, Statistics]) -> None:
    linear, _, statistics = layer
    whole, clipped = (kind(group_size=GROUP)(linear.weight, statistics) for kind in (ModelOptMax, ModelOptAwqClip))
    shares = clipped.scale / whole.scale
    assert 0.49 < float(shares.min()) < 0.8
    assert float(shares.max()) <= 1


def test_rows_at_a_time_give_the_same_bits(
    layer: tuple[nn.Linear, Tensor, Statistics], monkeypatch: pytest.MonkeyPatch
) -> None:
    linear, _, statistics = layer
    method = ModelOptAwqClip(group_size=GROUP)
    once = method(linear.weight, statistics)
    monkeypatch.setattr("deepseek_compress.numerics.modelopt.AT_ONCE", 5 * GROUP * COLUMNS)
    again = method(linear.weight, statistics)
    assert all(torch.equal(a, b) for a, b in zip(once[:3], again[:3], strict=True))


def test_a_group_that_no_token_reached_keeps_its_range(layer: tuple[nn.Linear, Tensor, Statistics]) -> None:
    linear, x, _ = layer
    x = x.clone()
    x[:, :GROUP] = 0
    result = ModelOptAwqClip(group_size=GROUP)(linear.weight, Statistics(TOKENS, x.t() @ x))
    kept = ModelOptMax(group_size=GROUP)(linear.weight, Statistics())
    assert float((result.scale[:, 0] / kept.scale[:, 0]).median()) > 0.7


def test_scales_are_those_of_modelopt_on_the_text(layer: tuple[nn.Linear, Tensor, Statistics]) -> None:
    linear, x, statistics = layer
    theirs = by_modelopt(linear, x, "awq_lite").input_quantizer.pre_quant_scale
    before = linear.weight.clone()
    parts = [linear.weight[:10], linear.weight[10:]]  # two linears that read the same input
    scales = ModelOptAwqLite(group_size=GROUP).scales(parts, statistics)
    assert torch.allclose(scales, 1 / theirs, rtol=1e-4)
    assert torch.equal(linear.weight, before)


def test_root_of_a_singular_hessian() -> None:
    x = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    r = root((x.t() @ x).expand(2, 20, 20))
    assert torch.allclose(r.mT @ r, (x.t() @ x).expand(2, 20, 20), atol=1e-4)


def test_nothing_is_printed_and_no_random_number_drawn(
    layer: tuple[nn.Linear, Tensor, Statistics], capsys: pytest.CaptureFixture[str]
) -> None:
    linear, _, statistics = layer
    before = torch.get_rng_state()
    ModelOptAwqClip(group_size=GROUP)(linear.weight, statistics)
    assert torch.equal(before, torch.get_rng_state())
    assert capsys.readouterr().out == ""


RECIPE = """
model: {model}
calibration: {{sources: [builtin], samples: 4, length: 64}}
stages:
  - compress: {{weights: {{{weights}}}, migration: {migration}, overrides: {overrides}}}
"""


def recipe(model: Path, weights: str, migration: str = "null", overrides: str = "[]") -> Any:
    return parse_recipe(RECIPE.format(model=model, weights=weights, migration=migration, overrides=overrides), "r.yaml")


def test_a_recipe_of_modelopt_alone(tiny_v3: Path, tmp_path: Path) -> None:
    """Its AWQ from end to end: scales, then clips; what servers read is a symmetric scheme."""
    wanted = recipe(tiny_v3, "modelopt_awq_clip: {group_size: 32}", "{modelopt_awq_lite: {group_size: 32}}")
    plain = recipe(tiny_v3, "rtn: {group_size: 32, symmetric: true}")
    peaks = [plan(each).forecasts["compress"].peak(1) or 0 for each in (plain, wanted)]
    assert peaks[1] > peaks[0] + LOADED, "importing it counts"
    run(wanted, tmp_path / "out", Options(workers=1), flat=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    (group,) = config["quantization_config"]["config_groups"].values()
    assert group["weights"] | {"num_bits": 4, "symmetric": True, "group_size": 32} == group["weights"]
    blocks = json.loads((tmp_path / "out" / "dsc_layers.json").read_text())["blocks"]
    methods = {linear["method"] for block in blocks for linear in block["linears"]}
    assert "modeloptawqclip" in methods <= {"modeloptawqclip", "rtn"}


def test_asymmetric_overrides_are_refused(tiny_v3: Path) -> None:
    overrides = '[{modules: "*.self_attn.*", symmetric: false}]'
    found = plan(recipe(tiny_v3, "modelopt_max: {group_size: 32}", overrides=overrides)).problems
    assert "no zero points" in str(found[0])


def test_without_the_package_there_is_one_line(tiny_v3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_compress.numerics.modelopt.find_spec", lambda name: None)
    with pytest.raises(DscError, match=r"yaml:5: .*not installed; pip install 'deepseek-compress\[modelopt\]'"):
        recipe(tiny_v3, "modelopt_max: {}")
    monkeypatch.undo()
    method = ModelOptMax(group_size=GROUP)
    monkeypatch.setitem(sys.modules, "modelopt.torch.quantization", None)
    with pytest.raises(DscError, match="not installed"):
        method(torch.ones(2, GROUP), Statistics())

"""Sensitivities against the slow road: the whole model in memory with one unit replaced, run from its first token."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.compress.fused_groups import fused_groups
from deepseek_compress.compress.overrides import Scheme
from deepseek_compress.compress.selection import CHANGEABLE
from deepseek_compress.evaluation import fisher
from deepseek_compress.evaluation.allocation import choices
from deepseek_compress.evaluation.sensitivity import Choice, Search, cost, joint, measure
from deepseek_compress.models import Architecture, Role
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.weights import HookedWeights
from deepseek_compress.numerics import WEIGHTS, Statistics
from deepseek_compress.numerics.types import WeightQuantizer
from deepseek_compress.workers import open_pool

DRAW = torch.Generator().manual_seed(3)
JUDGING, FITTING = (torch.randint(2, 512, (n, 20), generator=DRAW) for n in (2, 8))
OPTIONS = (Scheme(num_bits=2), Scheme(num_bits=4, group_size=64), Scheme(keep=True))


def search_of(path: Path, work: Path, method: str = "rtn", layers: tuple[int, ...] = (0, 2)) -> Search:
    architecture = Architecture.of(open_checkpoint(path))
    weights = WEIGHTS[method].model_validate({})
    groups = fused_groups(architecture, frozenset(CHANGEABLE) - {Role.INDEXER})
    found = tuple(choices([group for group in groups if group.block.layer in layers], weights, OPTIONS, 32))
    return Search(architecture, found, weights.needs, 4, JUDGING, FITTING, work)


def no_progress(done: int, total: int, note: str) -> None:
    assert 0 <= done <= total


@torch.no_grad()
def slow(model: Model, changed: Mapping[str, Tensor]) -> float:
    """KL in float64 over all positions, of the model with the weights `changed`."""
    other = Model(model.family, model.cfg, {**model.weights, **changed})
    p, q = (m.forward(JUDGING).double().log_softmax(-1) for m in (model, other))
    return float((p.exp() * (p - q)).sum(-1).mean())


@functools.cache
def inputs(model: Model) -> dict[str, Tensor]:
    """What each linear of the original sees of the fitting text, (tokens, columns)."""
    seen: dict[str, Tensor] = {}
    watched = Model(model.family, model.cfg, model.weights)
    for layer, block in enumerate(watched.blocks):

        def look(name: str, x: Tensor, prefix: str = model.family.prefix(layer)) -> None:
            seen[f"{prefix}.{name}"] = x.reshape(-1, x.shape[-1])

        watched.blocks[layer] = HookedWeights(block, look)
    with torch.no_grad():
        watched.forward(FITTING)
    return seen


def replaced(search: Search, model: Model, choice: Choice, quantizer: WeightQuantizer | None) -> dict[str, Tensor]:
    """The weights of a unit after the method alone; few or no tokens: rounded to nearest."""
    found: dict[str, Tensor] = {}
    seen = inputs(model) if search.needs and quantizer is not None else {}
    for name in choice.group.names if quantizer is not None else ():
        assert quantizer is not None
        x, weight = seen.get(name, torch.empty(0, 1)), model.weights[name + ".weight"]
        if search.needs and len(x) < search.min_tokens:
            rounding = WEIGHTS["rtn"](num_bits=quantizer.num_bits, group_size=quantizer.group_size)
            found[name + ".weight"] = rounding(weight, Statistics()).dequantize()
        else:
            found[name + ".weight"] = quantizer(weight, Statistics(len(x), x.T @ x)).dequantize()
    return found


@pytest.mark.parametrize("name", ["tiny_v3", "tiny_qwen2"])
def test_losses_are_those_of_the_whole_model_with_one_unit_replaced(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    search = search_of(request.getfixturevalue(name), tmp_path)
    model = Model.load(search.architecture.source)
    with open_pool(search) as pool:
        losses = measure(search, pool, no_progress)
        for choice, found in zip(search.choices, losses, strict=True):
            assert len(found) == len(choice.options)
            for quantizer, loss in zip(choice.options, found, strict=True):
                expected = slow(model, replaced(search, model, choice, quantizer))
                assert loss == pytest.approx(expected, rel=2e-3, abs=1e-7), choice.group.label
        chosen = [place % len(choice.options) for place, choice in enumerate(search.choices)]
        together: dict[str, Tensor] = {}
        for choice, option in zip(search.choices, chosen, strict=True):
            together |= replaced(search, model, choice, choice.options[option])
        assert joint(search, chosen, pool) == pytest.approx(slow(model, together), rel=2e-3)


def test_statistics_are_those_of_the_original(tiny_v3: Path, tmp_path: Path) -> None:
    search = search_of(tiny_v3, tmp_path, "gptq", layers=(2,))
    model = Model.load(search.architecture.source)
    with open_pool(search) as pool:
        losses = measure(search, pool, no_progress)
    for choice, found in zip(search.choices, losses, strict=True):
        for quantizer, loss in zip(choice.options, found, strict=True):
            expected = slow(model, replaced(search, model, choice, quantizer))
            assert loss == pytest.approx(expected, rel=0.02, abs=1e-7), choice.group.label  # sums in another order


def test_two_workers_and_a_run_that_was_stopped_give_the_same(tiny_v2: Path, tmp_path: Path) -> None:
    alone = search_of(tiny_v2, tmp_path / "1", "gptq")
    with open_pool(alone) as pool:
        losses = measure(alone, pool, no_progress)
    two = search_of(tiny_v2, tmp_path / "2", "gptq")

    def stop(done: int, total: int, note: str) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with open_pool(two, 2) as pool, pytest.raises(KeyboardInterrupt):
        measure(two, pool, stop)
    left = {file.name for file in (tmp_path / "2").iterdir()}
    assert "losses-00000.json" in left
    assert "losses-00002.json" not in left
    with open_pool(two, 2) as pool:
        assert measure(two, pool, no_progress) == losses


def test_what_is_planned_grows_with_what_is_done(tiny_v3: Path, tmp_path: Path) -> None:
    search = search_of(tiny_v3, tmp_path)
    shapes = search.architecture.cfg, search.choices
    memory, work, disk = cost(*shapes, judging=1000, fitting=0)
    more, worked, filled = cost(*shapes, judging=2000, fitting=3000)
    assert disk == 4 * 1000 * 128 * 4
    assert filled == 5 * disk
    assert more.task > memory.task > 4 * 1000 * 128 * 20
    assert worked.products > 2 * work.products


@pytest.mark.parametrize("name", ["tiny_v3", "tiny_qwen2"])
def test_the_estimate_is_that_of_its_formula_on_the_whole_model(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Gradients of the whole model by autograd, a window at a time, for outcomes drawn the same way."""
    search = search_of(request.getfixturevalue(name), tmp_path)
    with open_pool(search) as pool:
        found = fisher.estimate(search, pool, no_progress)
        assert fisher.estimate(search, pool, no_progress) == found
    model = Model.load(search.architecture.source)
    moved = [
        [
            {key: new - model.weights[key] for key, new in replaced(search, model, choice, option).items()}
            for option in choice.options
        ]
        for choice in search.choices
    ]
    leaves = {name: weight.requires_grad_() for name, weight in model.weights.items() if "proj" in name}
    draw, expected = torch.Generator().manual_seed(0), [[0.0] * len(options) for options in moved]
    for window in JUDGING:
        scores = model.forward(window[None])[0].log_softmax(-1)
        drawn = torch.multinomial(scores.detach().exp(), 1, generator=draw)
        parts = torch.autograd.grad(scores.gather(1, drawn).sum(), list(leaves.values()), allow_unused=True)
        slope = {key: part for key, part in zip(leaves, parts, strict=True) if part is not None}
        for sums, options in zip(expected, moved, strict=True):
            for number, move in enumerate(options):
                along = sum(float((move[key] * slope[key]).sum()) for key in move if key in slope)
                sums[number] += 0.5 * along**2 / JUDGING.numel()
    for mine, theirs, choice in zip(found, expected, search.choices, strict=True):
        assert mine == pytest.approx(theirs, rel=5e-3, abs=1e-8), choice.group.label
        assert mine[choice.options.index(None)] == 0


def test_the_estimate_comes_near_what_is_measured(tiny_llama: Path, tmp_path: Path) -> None:
    """Small changes, 48 windows: a relative error of sqrt(2 / 48) = 0.2 each."""
    search = search_of(tiny_llama, tmp_path, layers=(0, 1))
    windows = torch.randint(2, 512, (48, 12), generator=torch.Generator().manual_seed(1))
    bits = tuple(Scheme(num_bits=bits) for bits in (6, 8))
    found = tuple(choices([choice.group for choice in search.choices], WEIGHTS["rtn"].model_validate({}), bits, 32))
    search = dataclasses.replace(search, judging=windows, choices=found)
    with open_pool(search) as pool:
        pairs = zip(measure(search, pool, no_progress), fisher.estimate(search, pool, no_progress), strict=True)
        ratios = [mine / true for measured, estimated in pairs for true, mine in zip(measured, estimated, strict=True)]
    assert len(ratios) == 16
    assert all(0.4 < ratio < 2 for ratio in ratios)
    assert sum(ratios) / len(ratios) == pytest.approx(1, abs=0.2)

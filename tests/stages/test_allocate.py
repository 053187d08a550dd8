"""Allocate: targets, sizes as they come out on the disk, and a recipe that can be run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.compress.fused_groups import fused_groups
from deepseek_compress.compress.overrides import Scheme
from deepseek_compress.compress.selection import CHANGEABLE
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation import allocation
from deepseek_compress.evaluation.allocation import Target
from deepseek_compress.models import Architecture, Role
from deepseek_compress.numerics import WEIGHTS
from deepseek_compress.numerics.migration import SmoothQuant
from deepseek_compress.pipeline import Options, plan, run
from deepseek_compress.recipe import parse_recipe
from tests.conftest import V3_CONFIG, shape_of

ROLES = frozenset(CHANGEABLE) - {Role.INDEXER}
RECIPE = """
model: {model}
calibration: {{sources: [builtin], samples: 6, length: 48}}
stages:
  - allocate: {{target: {target}, weights: {weights}, windows: 3, options: {options}}}
"""
OPTIONS = "[{num_bits: 2}, {num_bits: 3, group_size: 32}, {num_bits: 4}, {num_bits: 8, symmetric: true}]"


def wanted(model: Path, target: str = "3.5 bits per weight", weights: str = "rtn", options: str = OPTIONS) -> Any:
    return parse_recipe(RECIPE.format(model=model, target=target, weights=weights, options=options), "mixed.yaml")


def test_targets() -> None:
    assert Target.parse("3.5 bits per weight") == Target(3.5, None)
    assert Target.parse(" 8GiB ") == Target(None, 8 << 30)
    assert Target.parse("700 MB") == Target(None, 700_000_000)
    for text in ("3.5", "8 bits", "GiB", "0 GiB", "-1 GiB", "four bits per weight"):
        with pytest.raises(DscError, match="write for instance"):
            Target.parse(text)


def test_what_cannot_work_is_told_before_a_byte_is_read(tiny_v3: Path) -> None:
    with pytest.raises(DscError, match=r"mixed.yaml:5: target: invalid size '3.5'"):
        wanted(tiny_v3, "'3.5'")
    (problem,) = plan(wanted(tiny_v3, "2.1 bits per weight")).problems
    assert re.search(r"2\.1 bits per weight asked for, the smallest options take 2\.\d+ bits per weight", str(problem))
    (problem,) = plan(wanted(tiny_v3, "100 KB")).problems
    assert "GiB asked for" in str(problem)
    with pytest.raises(DscError, match="unknown weights 'gptr'; did you mean 'gptq'"):
        wanted(tiny_v3, weights="gptr")
    assert plan(wanted(tiny_v3)).problems == []


@pytest.mark.parametrize("target", ["3.5 bits per weight", "0.62 MB"])
def test_the_recipe_runs_and_its_output_has_the_size_that_was_asked_for(
    target: str, tiny_v3: Path, tmp_path: Path
) -> None:
    run(wanted(tiny_v3, target), tmp_path / "bits", flat=True)
    found = json.loads((tmp_path / "bits" / "sensitivity.json").read_text())
    text = (tmp_path / "bits" / "recipe.yaml").read_text()
    run(parse_recipe(f"model: {tiny_v3}\n{text}", "recipe.yaml"), tmp_path / "out", flat=True)
    done = open_checkpoint(tmp_path / "out")
    rows = {row["unit"]: row for row in found["units"]}
    taken = weights = 0
    for group in fused_groups(shape_of(V3_CONFIG), ROLES):
        row = rows[group.label]
        option, size = row["options"][row["chosen"]], sum(done.header.tensors[n + ".weight"].bytes for n in group.names)
        assert 8 * size / group.weights == pytest.approx(option["bits_per_weight"], rel=1e-12)
        first = done.read_quantized(group.names[0] + ".weight")
        assert first is not None
        assert option["scheme"].startswith(f"{first.num_bits} bits, group_size {first.group_size}, ")
        taken, weights = taken + 8 * size, weights + group.weights
    assert found["bits_per_weight"] == pytest.approx(taken / weights)
    files = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert files <= found["bytes"] <= 1.2 * files
    assert found["bits_per_weight"] <= 3.5 if "bits" in target else files <= 620_000
    assert len({row["chosen"] for row in rows.values()}) > 1
    assert found["predicted_kl"] == pytest.approx(sum(r["options"][r["chosen"]]["kl"] for r in rows.values()))
    assert 0.2 < found["measured_kl"] / found["predicted_kl"] < 3
    gains(found, (tmp_path / "bits" / "sensitivity.md").read_text())


def gains(found: dict[str, Any], page: str) -> None:
    """What more bits save against one number of bits for all: predicted unit by unit, and measured."""
    assert 0 < found["plain_bits_per_weight"] <= found["bits_per_weight"] * 1.1
    assert found["predicted_gain"] == pytest.approx(found["plain_predicted_kl"] - found["predicted_kl"])
    assert found["measured_gain"] == pytest.approx(found["plain_measured_kl"] - found["measured_kl"])
    assert found["predicted_gain"] == pytest.approx(sum(row["gain"] for row in found["moved"]))
    assert [row["gain"] for row in found["moved"]] == sorted((row["gain"] for row in found["moved"]), reverse=True)
    assert found["measured_gain"] > 0
    assert "it came true" in page
    assert f"| {found['moved'][0]['unit']} | {found['moved'][0]['role']} |" in page


def test_one_number_of_bits_is_the_largest_that_fits(tiny_v3_bf16: Path) -> None:
    options = [Scheme(num_bits=2), Scheme(num_bits=4), Scheme(num_bits=8, symmetric=True)]
    found = allocation.choices(fused_groups(shape_of(V3_CONFIG), ROLES), WEIGHTS["rtn"].model_validate({}), options, 32)
    sizes = allocation.sizes(open_checkpoint(tiny_v3_bf16).header, found)
    for bits, option in ((2.99, 0), (5.5, 1), (9.5, 2)):
        assert allocation.uniform(found, sizes, Target(bits)) == [option] * len(found)
    assert allocation.uniform(found, sizes, Target(1.0)) is None
    plain, chosen = [1] * len(found), [1] * (len(found) - 2) + [2, 0]
    losses = [[0.5, 0.1 * place, 0.01] for place in range(len(found))]
    moved = allocation.moved(found, losses, plain, chosen)
    last = len(found) - 1
    assert [row["gain"] for row in moved] == pytest.approx(
        sorted([0.1 * (last - 1) - 0.01, 0.1 * last - 0.5], reverse=True)
    )
    assert {row["to"].partition(",")[0] for row in moved} == {"8 bits", "2 bits"}
    assert allocation.moved_lines([]) == ""


def test_two_workers_write_the_same_files(tiny_v3: Path, tmp_path: Path) -> None:
    for count in (1, 2):
        run(wanted(tiny_v3, weights="gptq"), tmp_path / str(count), Options(workers=count), flat=True)
    for name in ("recipe.yaml", "sensitivity.json", "sensitivity.md", "dsc_manifest.json"):
        first, second = ((tmp_path / str(count) / name).read_bytes() for count in (1, 2))
        assert first == second, name
    assert not (tmp_path / "1" / ".dsc_allocate").exists()
    page = (tmp_path / "1" / "sensitivity.md").read_text()
    assert "| model.layers.1.mlp.experts | 196,608 |" in page
    page = page.partition("## Where")[0]
    assert page.count("**") == 2 * page.count("| model.layers.")


@given(st.data())
def test_the_recipe_says_what_was_chosen(data: st.DataObject) -> None:
    options = [
        Scheme(num_bits=2),
        Scheme(num_bits=5, symmetric=True),
        Scheme(num_bits=3, group_size=16),
        Scheme(keep=True),
    ]
    weights = WEIGHTS["gptq"].model_validate({"damping": 0.01})
    found = allocation.choices(fused_groups(shape_of(V3_CONFIG), ROLES), weights, options, 32)
    chosen = [data.draw(st.integers(0, len(choice.options) - 1)) for choice in found]
    if all(choice.options[option] is None for choice, option in zip(found, chosen, strict=True)):
        return
    settings = {"sources": ["my text: a.jsonl", "no"], "samples": 3}
    moved = data.draw(st.sampled_from([None, SmoothQuant(alpha=0.4, samples=3)]))
    recipe = parse_recipe(allocation.recipe(found, chosen, weights, settings, "a note", moved), "recipe.yaml")
    assert [source.path for source in recipe.calibration.sources] == ["my text: a.jsonl", "no"]
    stage: Any = recipe.steps[0].stage
    assert stage.migration == moved
    from deepseek_compress.compress.selection import select

    picked = select(shape_of(V3_CONFIG), ROLES, stage.weights, stage.overrides)
    for choice, option in zip(found, chosen, strict=True):
        for name, linear in zip(choice.group.names, choice.group.linears, strict=True):
            kept = not picked.wants(choice.group.block, linear)
            expected = choice.options[option]
            assert (None if kept else picked.quantizer(name, linear.columns, stage.weights)) == expected


def test_a_unit_that_nothing_fits_is_kept_and_counted(tiny_v3: Path) -> None:
    header = open_checkpoint(tiny_v3).header
    found = allocation.choices(
        fused_groups(Architecture.of(header), ROLES), WEIGHTS["rtn"].model_validate({}), [Scheme(num_bits=4)], 128
    )
    kept = {choice.group.label: choice for choice in found if choice.options == (None,)}
    assert "model.layers.1.mlp.experts" in kept  # 64 columns
    assert "model.layers.0.mlp.gate_proj+up_proj" not in kept
    sizes = allocation.sizes(header, found)
    assert sizes.taken([0] * len(found)) > 16 * kept["model.layers.1.mlp.experts"].group.weights

"""Each recipe of the package runs on a tiny model and does what its name says. (`quickstart`: see test_readme.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek_compress import resources
from tests.house.conftest import Dsc
from tests.house.short import TEXT

SINGLE = {"distill", "calibrate", "export", "evaluate", "mixed", "quickstart"}  # run by the examples of the README
TWO = {"distill-qat"}
COMPRESSING = sorted(set(resources.recipes()) - SINGLE - TWO)


@pytest.mark.parametrize("recipe", COMPRESSING)
def test_a_recipe_runs(dsc: Dsc, tiny_llama: Path, text: Path, recipe: str) -> None:
    size = [] if recipe == "sparse24" else ["--group-size", "32"]
    done = dsc("run", recipe, "--model", tiny_llama, *TEXT, "--calibration", text, *size, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    out = Path(found["outputs"]["compress"])
    assert out == Path("runs") / recipe / "compress"
    assert found["next"] == f"dsc evaluate {out} --reference {tiny_llama} -o report.json"
    survey = json.loads(dsc("inspect", out, "--sparsity", "--json").stdout)
    linears = [row for row in survey["roles"] if row["role"] in {"attention", "mlp"}]
    sparse = recipe.startswith("sparse24")
    least = 16 if recipe == "sparse24" else 8 if recipe.startswith("w8") else 4
    for row in linears:
        assert least <= row["bits_per_weight"] < least + 1
        assert (row["sparsity"] >= 0.5) == sparse
    assert (survey["activations"] is not None) == ("a8" in recipe)


def test_there_is_a_recipe_for_every_command_that_takes_one() -> None:
    assert {"distill", "sparse24", "calibrate", "w4a16", "export", "evaluate"} <= set(resources.recipes())


def test_quantised_weights_are_trained(dsc: Dsc, tiny_llama: Path, text: Path) -> None:
    few = ["--set", "distill.steps=2", "--set", "distill.length=64", "--set", "distill.batch_tokens=128"]
    options = [*TEXT, "--calibration", text, "--group-size", "32", *few]
    done = dsc("run", "distill-qat", "--model", tiny_llama, *options, "--json")
    assert done.exit_code == 0, done.output
    survey = json.loads(dsc("inspect", "runs/distill-qat/distill", "--json").stdout)
    bits = {row["role"]: row["bits_per_weight"] for row in survey["roles"]}
    assert 3 <= bits["attention"] < 4.1
    assert 3 <= bits["mlp"] < 4.1

"""Each recipe of the package runs on a tiny model and does what its name says. (`quickstart`: see test_readme.)"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek_compress import resources
from tests.house.conftest import Dsc
from tests.house.short import TEXT

SINGLE = {"distill", "calibrate", "export", "evaluate", "mixed", "quickstart"}  # run by the examples of the README
TWO = {"distill-qat", "distill-traces", "distill-progressive", "sparse24-recovered"}
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
        bits = 8 if recipe == "w4a16-best" and row["role"] == "attention" else least
        assert bits <= row["bits_per_weight"] < bits + 1
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


def test_zeros_are_told_and_trained_under(dsc: Dsc, tiny_llama: Path, text: Path) -> None:
    few = ["--set", "distill.minutes=0.01", "--set", "distill.length=64", "--set", "distill.batch_tokens=128"]
    done = dsc("run", "sparse24-recovered", "--model", tiny_llama, *TEXT, "--calibration", text, *few)
    assert done.exit_code == 0, done.output
    assert "of the calibration text: KL" in done.output
    survey = json.loads(dsc("inspect", "runs/sparse24-recovered/distill", "--sparsity", "--json").stdout)
    assert all(row["sparsity"] >= 0.5 for row in survey["roles"] if row["role"] in {"attention", "mlp"})
    card = Path("runs/sparse24-recovered/compress/README.md").read_text(encoding="utf-8")
    assert "## What it cost" in card


def test_three_phases(dsc: Dsc, tiny_llama: Path, text: Path) -> None:
    knobs = {"steps": 1, "length": 64, "batch_tokens": 128, "documents": 8}
    stages = ("tuned", "imitating", "student")
    few = [word for stage in stages for key, n in knobs.items() for word in ("--set", f"{stage}.{key}={n}")]
    done = dsc("run", "distill-progressive", "--model", tiny_llama, "--calibration", text, *few, "--json")
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)["outputs"]) >= set(stages)


def test_a_student_of_what_its_teacher_wrote(dsc: Dsc, tmp_path: Path) -> None:
    """Judged by a function of the command line; without it by the built-in verifier, see test_traces."""
    (tmp_path / "mine.py").write_text("def short(question, answer, completion):\n    return len(completion) < 1000\n")
    few = ["traces.count=3", "traces.limit=120", "student.steps=1", "student.length=64", "student.batch_tokens=128"]
    options = [word for knob in few for word in ("--set", knob)]
    given = ["run", "distill-traces", "--model", "builtin:nano", *options]
    done = dsc(*given, "--verifier", f"{tmp_path / 'mine.py'}:short")
    assert done.exit_code == 0, done.output
    assert len(Path("runs/distill-traces/traces/traces.jsonl").read_text(encoding="utf-8").splitlines()) >= 2
    other = dsc(*given)
    assert other.exit_code == 1
    assert "verifier" in other.output
    refused = dsc("run", "sparse24", "--model", "builtin:nano", "--verifier", f"{tmp_path / 'mine.py'}:short")
    assert refused.exit_code == 1
    assert "has no stage traces" in refused.output

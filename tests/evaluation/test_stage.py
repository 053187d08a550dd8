"""The evaluate stage: which models it takes, what it writes, and what it says about engines."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deepseek_compress.checkpoint import open_checkpoint, owned
from deepseek_compress.errors import DscError, Problems
from deepseek_compress.reports import read
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.evaluate import Evaluate, artifacts, title


def context(out: Path, **outputs: Path) -> Context:
    out.mkdir(parents=True)
    return Context(name="evaluate", out=out, recipe_text="name: whole\nstages: []\n", seed=0, outputs=outputs)


def test_it_writes_the_report_of_every_checkpoint(tiny_v3: Path, tiny_v2: Path, tmp_path: Path) -> None:
    engine = tmp_path / "run" / "engine"
    engine.mkdir(parents=True)
    (engine / "model.engine").write_bytes(b"x" * 100)
    (engine / "model.onnx").write_bytes(b"x" * 1000)
    agreement = {"kl": 3e-7, "positions": 200, "agreed": 64, "decoded": 64}
    facts = {"target": "tensorrt-rtx", "status": "built, not run", "onnx_bytes": 1000, "verification": agreement}
    (engine / "dsc_run.json").write_text(json.dumps({"facts": facts}))
    stage = Evaluate.model_validate({"problems": 2, "efficiency": False, "reference": "teacher"})
    paths = {"model": tiny_v3, "teacher": tiny_v3, "student": tiny_v2, "engine": engine / "model.engine"}
    told = context(tmp_path / "run" / "evaluate", **paths)
    output = stage.run(open_checkpoint(tiny_v3), told)
    assert (output.kind, output.path) == ("report", tmp_path / "run" / "evaluate" / "report.json")
    record = read(output.path)
    assert record["name"] == "whole"
    assert record["recipe"] == "name: whole\nstages: []\n"
    assert [model["name"] for model in record["models"]] == ["teacher", "student"]
    assert record["artifacts"] == [
        {"name": "engine", "target": "tensorrt-rtx", "path": str(engine / "model.engine"), "bytes": 100,
         "status": "built, not run", "verification": agreement,
         "note": "its ONNX logits at KL 3e-07 from the runtime's over 200 positions, "
                 "64 of 64 clear greedy tokens equal"}
    ]  # fmt: skip
    left = {path.name for path in output.path.parent.iterdir()} - set(owned.NAMES)  # which the pipeline forgets
    assert left == {"report.json", "report.md", "report.html"}


def test_ablations_stand_beside_the_models(tiny_v3: Path, tiny_v2: Path, tmp_path: Path) -> None:
    stage = Evaluate.model_validate(
        {"models": ["teacher"], "reference": "teacher", "ablations": ["shot"], "problems": 0, "efficiency": False}
    )
    assert set(stage.reads()) == {"teacher", "shot"}
    output = stage.run(open_checkpoint(tiny_v3), context(tmp_path / "out", teacher=tiny_v3, shot=tiny_v2))
    record = read(output.path)
    assert [model["name"] for model in record["models"]] == ["teacher"]
    assert [model["name"] for model in record["ablations"]] == ["shot"]
    assert record["models"][0]["metrics"]["exact_match"] is None
    assert record["models"][0]["bytes"] > 0


def test_a_cache_of_few_bits_is_evaluated_against_16_bits(tiny_qwen2: Path, tmp_path: Path) -> None:
    knobs = {"models": ["ours", "same"], "reference": "same", "problems": 1, "efficiency": False}
    stage = Evaluate.model_validate({**knobs, "kv_cache": {"num_bits": 4}})
    output = stage.run(open_checkpoint(tiny_qwen2), context(tmp_path / "out", ours=tiny_qwen2, same=tiny_qwen2))
    ours, same = read(output.path)["models"]
    assert (ours["kv_cache_bytes_per_token"], same["kv_cache_bytes_per_token"]) == (2 * 4 * 18.5, 2 * 4 * 64)
    assert ours["about"] == "BF16, 4-bit KV cache"
    assert 1e-6 < ours["metrics"]["kl_divergence"] < 0.1
    assert same["metrics"]["kl_divergence"] == 0
    assert "Cache a token" in output.path.with_suffix(".md").read_text()
    stage = Evaluate.model_validate({**knobs, "kv_cache": {"group_size": 24}})
    with pytest.raises(Problems, match="heads of 32 channels do not divide into groups of 24"):
        stage.run(open_checkpoint(tiny_qwen2), context(tmp_path / "bad", ours=tiny_qwen2, same=tiny_qwen2))


def test_mistakes_are_one_line(tiny_v3: Path, tmp_path: Path) -> None:
    with pytest.raises(DscError, match="unknown suite 'gsm'; valid names: builtin"):
        Evaluate.model_validate({"suite": "gsm"})
    stage = Evaluate.model_validate({"models": ["none"]})
    with pytest.raises(DscError, match="unknown output 'none'; valid names: teacher"):
        stage.run(open_checkpoint(tiny_v3), context(tmp_path / "out", teacher=tiny_v3))
    assert list((tmp_path / "out").iterdir()) == []


def test_reports_and_checkpoints_are_no_artifacts(tiny_v3: Path, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    assert artifacts({"model": tiny_v3, "evaluate": tmp_path / "report.json", "nothing": tmp_path / "nothing"}) == []


def test_a_report_has_the_name_of_its_recipe_or_says_what_is_compared() -> None:
    assert title("# name: no\nname: quickstart\nstages: []\n", ["a"], None) == "quickstart"
    assert title("stages: []\n", ["base", "small"], "base") == "small against base"
    assert title("", ["only"], None) == title("", ["only"], "only") == "only"

"""A whole evaluation of the tiny model: the record's keys, values that must agree, and what may not be compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.checkpoint.files import hash_file, write_sealed
from deepseek_compress.errors import DscError, Problems
from deepseek_compress.evaluation import answering, efficiency, reasoning, summary
from deepseek_compress.evaluation.about import about
from deepseek_compress.evaluation.record import Settings, evaluate
from deepseek_compress.evaluation.row import METRICS
from deepseek_compress.evaluation.statistics import Bootstrap
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.tasks import END_THINK, THINK, Verdict, split_of, verify

MODEL_KEYS = {"name", "path", "bytes", "bits_per_weight", "parameters", "metrics", "intervals", "lineage"}


@pytest.fixture(scope="module")
def record(tiny_v3: Path, tiny_v3_bf16: Path, tiny_v2: Path, tmp_path_factory: Any) -> dict[str, Any]:
    copy = tmp_path_factory.mktemp("copies") / "same"
    shutil.copytree(tiny_v3, copy)
    settings = Settings(problems=6, efficiency=False)
    models = {"teacher": tiny_v3, "same": copy, "bf16": tiny_v3_bf16}
    return evaluate(models, "teacher", settings, ablations={"other": tiny_v2})


def test_the_record_has_the_keys_that_stay_stable(record: dict[str, Any]) -> None:
    assert {"schema", "reference", "models", "artifacts", "machine", "versions"} <= set(record)
    assert (record["schema"], record["reference"]) == (1, "teacher")
    assert [model["name"] for model in record["models"]] == ["teacher", "same", "bf16"]
    assert [model["name"] for model in record["ablations"]] == ["other"]
    for model in [*record["models"], *record["ablations"]]:
        assert set(model) >= MODEL_KEYS
        assert set(model["metrics"]) == set(METRICS)
        assert model["metrics"]["peak_bytes"] is None  # not measured: null, not left out
        for low, high in (limits for limits in model["intervals"].values() if limits):
            assert low <= high
    json.dumps(record, allow_nan=False)


def test_equal_models_have_equal_numbers(record: dict[str, Any]) -> None:
    teacher, same, _ = record["models"]
    assert same["metrics"] == teacher["metrics"]
    assert same["metrics"]["kl_divergence"] == 0
    assert same["metrics"]["top1_agreement"] == 1
    assert same["intervals"]["exact_match_difference"] == [0, 0]
    assert same["error_by_layer"] == [0, 0, 0]
    assert teacher["error_by_layer"] is None
    assert [one["error"] for one in same["outliers_by_layer"]] == [0, 0, 0]
    other = record["ablations"][0]
    assert other["metrics"]["kl_divergence"] > 0.001
    assert (
        other["intervals"]["kl_divergence"][0]
        <= other["metrics"]["kl_divergence"]
        <= other["intervals"]["kl_divergence"][1]
    )


def test_sizes_are_those_of_the_files(record: dict[str, Any], tiny_v3: Path) -> None:
    teacher, _, plain = record["models"]
    assert teacher["bytes"] == sum(file.stat().st_size for file in tiny_v3.glob("*.safetensors"))
    logical = open_checkpoint(tiny_v3).header.tensors.values()
    assert teacher["parameters"] == plain["parameters"] == sum(torch.Size(info.shape).numel() for info in logical)
    assert teacher["bits_per_weight"] == 8 * teacher["bytes"] / teacher["parameters"]
    assert 8 < teacher["bits_per_weight"] < plain["bits_per_weight"] < 17


def test_every_model_gets_the_same_unseen_problems(record: dict[str, Any]) -> None:
    assert record["suite"]["problems"] == 6 == sum(record["suite"]["families"].values())
    first, again = reasoning.load_suite("builtin", 50), reasoning.load_suite("builtin", 50)
    assert first == again
    assert all(split_of(problem.prompt) == "test" for problem in first)


def test_text_windows_decide_fidelity_and_problems_may_be_left_out(
    tiny_v3: Path, tiny_v2: Path, tmp_path: Path
) -> None:
    text = tmp_path / "some.txt"
    text.write_text(" ".join(problem.prompt for problem in reasoning.load_suite("builtin", 20)))
    settings = Settings(suite=None, text=text, windows=3, length=16, efficiency=False)
    found = evaluate({"a": tiny_v3, "b": tiny_v2}, "a", settings)
    assert found["suite"] is None
    assert found["text"] == {"source": "some.txt", "windows": 3, "length": 16, "tokens": 45, "mode": "in memory"}
    assert found["models"][1]["metrics"]["exact_match"] is None
    assert found["models"][1]["metrics"]["kl_divergence"] > 0
    with pytest.raises(DscError, match="windows of 16, 4000 are asked for"):
        evaluate({"a": tiny_v3}, None, Settings(suite=None, text=text, windows=4000, length=16))


def test_judging_on_calibration_text_is_said(tiny_v3: Path, tmp_path: Path) -> None:
    text, other = tmp_path / "some.txt", tmp_path / "other.txt"
    text.write_text(" ".join(problem.prompt for problem in reasoning.load_suite("builtin", 20)))
    other.write_text(text.read_text() + " 1")
    made = tmp_path / "made"
    shutil.copytree(tiny_v3, made)
    sources = [
        {"name": "a", "files": {"b.txt": "0" * 64}},
        {"name": "some.txt", "files": {"some.txt": hash_file(text)}},
    ]
    write_sealed(made / "dsc_manifest.json", {"calibration": {"sources": sources}})
    found = [
        evaluate(
            {"a": tiny_v3, "made": made}, "a", Settings(suite=None, text=judge, windows=2, length=16, efficiency=False)
        )
        for judge in (text, other)
    ]
    assert [note for note in found[0]["notes"] if "calibrated on some.txt" in note and note.startswith("made")]
    assert found[1]["notes"] == []


def test_another_tokenizer_is_not_compared(tiny_v3: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_v3, other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = evaluate({"a": tiny_v3, "b": other}, "a", Settings(problems=3, efficiency=False))
    assert found["models"][1]["metrics"]["kl_divergence"] is None
    assert any("another tokenizer" in note for note in found["notes"])


def test_every_problem_is_told_before_anything_runs(tiny_v3: Path, tmp_path: Path) -> None:
    with pytest.raises(DscError, match="'teacher' is not among the models"):
        evaluate({"a": tiny_v3}, "teacher")
    with pytest.raises(Problems) as caught:
        evaluate({"a": tmp_path / "one", "b": tiny_v3, "c": tmp_path / "two"}, None)
    assert [str(tmp_path / name) in str(caught.value) for name in ("one", "two")] == [True, True]
    with pytest.raises(DscError, match="unknown suite 'gsm'"):
        evaluate({"a": tiny_v3}, None, Settings(suite="gsm"))


def test_answers_are_judged_in_the_order_of_the_problems(tiny_v3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that knows every second solution is right on exactly those."""
    tokenizer, model = load_tokenizer(tiny_v3), Model.load(tiny_v3)
    problems = reasoning.load_suite("builtin", 9)
    prompts = reasoning.prepare(problems, tokenizer)
    known = {tuple(ids): i for i, ids in enumerate(prompts.ids)}

    def recite(asked: list[list[int]], limit: int, eos: Any, batch_size: int) -> list[list[int]]:
        texts = [p.solution if known[tuple(ids)] % 2 else "yes" for ids in asked for p in [problems[known[tuple(ids)]]]]
        found = [tokenizer.encode(text) for text in texts]
        assert max(map(len, found)) <= limit
        return found

    monkeypatch.setattr(model, "generate", recite)
    monkeypatch.setattr(answering, "BATCH", 4)
    verdicts = reasoning.answer(model, tokenizer, prompts)
    assert [verdict.exact for verdict in verdicts] == [False, True] * 4 + [False]
    assert [reasoning.step_share(verdict) for verdict in verdicts] == [0.0, 1.0] * 4 + [0.0]
    for problem, sample in zip(problems, prompts.solutions, strict=True):
        assert sample.tokens[-1] == tokenizer.eos_ids[0]
        text = tokenizer.decode(sample.tokens[sample.start : -1], skip_special=False)
        assert text.startswith(THINK)
        assert END_THINK in text
        assert verify(problem, text).exact


def test_scores_of_known_verdicts() -> None:
    verdicts = [
        Verdict(True, 1.0, 2, 2),
        Verdict(False, 0.5, 1, 4),
        Verdict(False, 0.0, 0, 0),
        Verdict(True, 1.0, 3, 4),
    ]
    metrics, intervals = summary.reasoning(verdicts, Bootstrap(4))
    assert metrics == {"exact_match": 0.5, "f1": 0.625, "valid_steps": 0.5}
    assert set(intervals) == set(metrics)
    relative, paired = summary.against(verdicts, [Verdict(True, 1.0, 1, 1)] * 4, Bootstrap(4))
    assert relative == {"exact_match": 0.5, "f1": 0.625, "valid_steps": 0.5}
    assert paired["exact_match_ratio"] == intervals["f1"] or paired["exact_match_ratio"][0] <= 0.5
    found = summary.families(verdicts, ["a", "b", "a", "b"])
    assert found["a"]["exact_match"] == 0.5
    assert found["b"]["valid_steps"] == 0.5
    assert summary.finite({"x": (float("inf"), 1.0), "y": [float("nan")]}) == {"x": [None, 1.0], "y": [None]}


def test_speed_and_memory_come_from_a_process_of_their_own(tiny_llama: Path) -> None:
    found = efficiency.speed_and_memory(tiny_llama)
    assert found["prefill_tokens_per_s"] > found["decode_tokens_per_s"] > 0
    assert found["peak_bytes"] > open_checkpoint(tiny_llama).header.bytes
    with pytest.raises(DscError, match="its speed could not be measured"):
        efficiency.speed_and_memory(tiny_llama / "nothing")


def test_about_says_what_the_weights_are(tiny_v3: Path, tiny_v2: Path) -> None:
    assert about(open_checkpoint(tiny_v3)) == "FP8 in blocks"
    assert about(open_checkpoint(tiny_v2)) == "BF16"

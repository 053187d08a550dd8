"""Logs of other harnesses: their scores become a record, problems are paired, malformed ones are one line."""

from __future__ import annotations

import copy
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.certainty import mcnemar
from deepseek_compress.reports import compare, files, table, words
from deepseek_compress.reports.markdown import markdown
from deepseek_compress.reports.page import page

STAMP = "2026-11-01T10-00-00.123456"


def harness(folder: Path, model: str, right: list[int], samples: bool = True) -> Path:
    """What `lm_eval --log_samples` leaves: two filters of one task, a group, a task without right or wrong."""
    folder.mkdir(parents=True)
    share = sum(right) / len(right)
    tasks = {
        "gsm8k": {"alias": "gsm8k", "exact_match,strict-match": share, "exact_match_stderr,strict-match": 0.01,
                  "exact_match,flexible-extract": 1.0},
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 12.0},
        "both": {"alias": "both", "acc,none": 0.9},
    }  # fmt: skip
    log = {
        "results": tasks, "groups": {"both": {"acc,none": 0.9}}, "configs": {"gsm8k": {}}, "config": {"model": "hf"},
        "n-samples": {"gsm8k": {"original": 1319, "effective": len(right)}}, "model_name": model,
        "lm_eval_version": "0.4.9",
    }  # fmt: skip
    (folder / f"results_{STAMP}.json").write_text(json.dumps(log))
    rows = [{"doc_id": i, "filter": "strict-match", "exact_match": float(one)} for i, one in enumerate(right)]
    rows += [{**row, "filter": "flexible-extract", "exact_match": 1.0} for row in rows]
    if samples:
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"samples_gsm8k_{STAMP}.jsonl").write_text(text)
    return folder / f"results_{STAMP}.json"


def inspect(model: str, grades: dict[int, list[str]]) -> dict[str, Any]:
    """A log of Inspect: two epochs are two samples of one id."""
    samples = [
        {"id": number, "epoch": epoch, "input": "q", "scores": {"match": {"value": grade, "answer": "4"}}}
        for number, row in grades.items()
        for epoch, grade in enumerate(row, start=1)
    ]
    score = {"name": "match", "metrics": {"accuracy": {"name": "accuracy", "value": 0.5}, "stderr": {"value": 0.1}}}
    return {"version": 2, "status": "success", "eval": {"task": "gsm8k", "model": model},
            "results": {"completed_samples": len(samples), "scores": [score]}, "samples": samples}  # fmt: skip


def test_a_log_of_the_harness_is_a_record(tmp_path: Path) -> None:
    found = files.read(harness(tmp_path / "a", "org/model", [1, 1, 0, 1]))
    row = found["models"][0]
    assert (row["name"], row["metrics"]["exact_match"]) == ("org/model", 0.75)
    assert row["families"] == {"gsm8k": {"exact_match": 0.75, "problems": 4}}
    assert row["intervals"]["exact_match"][0] < 0.75 < row["intervals"]["exact_match"][1]
    assert found["suite"] == {"name": "gsm8k", "problems": 4, "families": {"gsm8k": 4}}
    assert "org/model: tasks without right or wrong were left out: wikitext." in found["notes"]
    found.pop("scores")
    assert "75.0 %" in page(found)
    assert "read from a log of lm-evaluation-harness 0.4.9" in markdown(found)


def test_two_logs_are_compared_problem_by_problem(tmp_path: Path) -> None:
    before, after = [1] * 30 + [0] * 10, [1] * 20 + [0] * 10 + [1] * 2 + [0] * 8
    paths = [harness(tmp_path / "a", "original", before), harness(tmp_path / "b", "small", after)]
    found = compare(paths, tmp_path / "page.html")
    assert found["reference"] == "original"
    row = found["models"][1]
    assert (row["certainty"]["lost"], row["certainty"]["gained"]) == (10, 2)
    assert row["certainty"]["p"] == mcnemar(10, 2)
    assert row["relative"]["exact_match"] == pytest.approx(22 / 30)
    assert "beyond noise: small" in words.verdict(found)
    assert "scores" not in json.loads((tmp_path / "page.json").read_text())
    assert files.read(tmp_path / "page.json") == found


def test_without_samples_nothing_is_paired(tmp_path: Path) -> None:
    paths = [harness(tmp_path / "a", "original", [1, 0]), harness(tmp_path / "b", "small", [1, 1], samples=False)]
    found = compare(paths, None)
    assert found["models"][1].get("certainty") is None
    assert any("not compared with original problem by problem" in note for note in found["notes"])


def test_epochs_of_inspect_are_one_score_and_the_archive_is_the_log(tmp_path: Path) -> None:
    log = inspect("openai/small", {1: ["C", "I"], 2: ["C", "C"], 3: ["I", "N"], 4: ["P", "P"]})
    (tmp_path / "log.json").write_text(json.dumps(log))
    samples = log.pop("samples")
    with zipfile.ZipFile(tmp_path / "log.eval", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("header.json", json.dumps(log))
        for number, sample in enumerate(samples):
            archive.writestr(f"samples/{sample['id']}_epoch_{number}.json", json.dumps(sample))
    one, other = files.read(tmp_path / "log.json"), files.read(tmp_path / "log.eval")
    assert one["scores"] == other["scores"] == {"gsm8k": {"1": 0.5, "2": 1.0, "3": 0.0, "4": 0.5}}
    assert one["suite"]["problems"] == 4
    assert one["models"][0]["metrics"]["exact_match"] == 0.5


def test_a_log_stands_beside_a_report_of_ours(tmp_path: Path) -> None:
    mine = files.read(harness(tmp_path / "a", "teacher", [1, 1]))
    mine.pop("scores")
    mine.pop("log")
    mine["models"][0]["bytes"] = 1000
    files.write(mine, tmp_path / "mine.json")
    found = compare([tmp_path / "mine.json", harness(tmp_path / "b", "theirs", [1, 0])], None)
    assert found["reference"] == "teacher"
    assert [model["name"] for model in table.everything(found)] == ["teacher", "theirs"]
    assert found["models"][1].get("certainty") is None


def spoiled(log: dict[str, Any], *changes: tuple[str, Any]) -> dict[str, Any]:
    log = copy.deepcopy(log)
    for place, value in changes:
        *parents, last = place.split("/")
        target = log
        for key in parents:
            target = target[key]
        if value is None:
            del target[last]
        else:
            target[last] = value
    return log


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("n-samples", None), "a log without 'n-samples'"), (("n-samples/gsm8k/effective", "many"), "another form"),
        (("results/gsm8k/exact_match,strict-match", "N/A"), "another form"),
        (("results/gsm8k/exact_match,strict-match", 3.0), "another form"),
        (("results", {}), "scores answers as right or wrong"), (("results/gsm8k", 3), "another form"),
    ],
)  # fmt: skip
def test_malformed_logs_of_the_harness(change: tuple[str, Any], said: str, tmp_path: Path) -> None:
    path = harness(tmp_path / "a", "m", [1])
    path.write_text(json.dumps(spoiled(json.loads(path.read_text()), change)))
    with pytest.raises(DscError, match=said):
        files.read(path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("status", "error"), "status 'error'"), (("results/scores", []), "another form"),
        (("eval/model", None), "a log without 'model'"), (("samples", [3]), "another form"),
        (("samples", [{"scores": {"match": {"value": "C"}}}]), "a log without 'id'"),
    ],
)  # fmt: skip
def test_malformed_logs_of_inspect(change: tuple[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(json.dumps(spoiled(inspect("m", {1: ["C"]}), change)))
    with pytest.raises(DscError, match=said):
        files.read(tmp_path / "log.json")


def test_what_is_no_archive_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.eval").write_bytes(b"PK\x03\x04 no")
    with zipfile.ZipFile(tmp_path / "b.eval", "w") as archive:
        archive.writestr("header.json", "{")
    for name in ("a", "b", "c"):
        with pytest.raises(DscError, match=r"not a log of Inspect"):
            files.read(tmp_path / f"{name}.eval")

"""What a report says of certainty, floor and speed; conditions that fail a build; the table for a spreadsheet."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from deepseek_compress.cli import show
from deepseek_compress.errors import DscError
from deepseek_compress.reports import compare, errors, files, gate, page, proof, table, words
from deepseek_compress.reports.markdown import markdown
from deepseek_compress.reports.spreadsheet import csv_text


def row(name: str, size: int, exact: float, **more: Any) -> dict[str, Any]:
    metrics = dict.fromkeys(files.METRICS) | {"exact_match": exact, "kl_divergence": 0.02, "top1_agreement": 0.95}
    return {"name": name, "path": name, "bytes": size, "parameters": 100, "bits_per_weight": 4.0, "metrics": metrics,
            "intervals": {}, "lineage": [], **more}  # fmt: skip


def certainty(difference: float, p: float) -> dict[str, Any]:
    return {"difference": difference, "interval": [difference - 0.01, difference + 0.01], "p": p, "p_holm": p,
            "lost": 9, "gained": 3, "problems": 200, "hidden": 0.03, "needed": 3138, "level": 0.05}  # fmt: skip


def excerpt(answer: str) -> dict[str, Any]:
    return {"answer": answer, "text": f"so <b>{answer}</b>", "tokens": 5, "first_wrong_step": None}


@pytest.fixture
def record() -> dict[str, Any]:
    process = {"answers": 200, "tokens": 40.0, "inflation": 1.5, "thinking_tokens": None, "cut": 0.1, "looped": 0.05,
               "no_think": None, "unclosed_think": None, "no_answer": 0.0, "right_midway": 0.2,
               "verified_chains": 0.5, "first_wrong_step": {"2": 3}}  # fmt: skip
    flip = {"kind": "lost", "question": "<i>q</i>", "right": "4", "model": excerpt("5"), "reference": excerpt("4")}
    flips = {"lost": 1, "gained": 0, "changed": 0.1, "examples": [flip]}
    kl = {"median": 0.001, "p90": 0.01, "p99": 0.2, "max": 2.0, "worst": [],
          "by_entropy": [{"from": 0.0, "to": 1.0, "share": 0.3}, {"from": 1.0, "to": None, "share": 0.7}]}  # fmt: skip
    speed = {"runtime": "onnxruntime", "prefill_tokens_per_s": 900.0, "decode_tokens_per_s": 56.0, "peak_bytes": 9,
             "intervals": {"decode_tokens_per_s": [50.0, 60.0]}, "first_token_s": 0.1}  # fmt: skip
    small = row("small", 400, 0.47, certainty=certainty(-0.03, 0.2), process=process, flips=flips, kl=kl, speed=speed)
    base = {**speed, "runtime": proof.EVALUATION, "decode_tokens_per_s": 20.0, "intervals": None}
    return {
        "schema": 1, "name": "run", "reference": "teacher", "artifacts": [], "machine": {}, "versions": {},
        "models": [row("teacher", 1000, 0.5, speed=base), small], "text": None, "notes": [],
        "suite": {"name": "gsm8k.jsonl", "problems": 200, "families": {"gsm8k": 200}},
    }  # fmt: skip


def test_no_difference_seen_says_what_it_could_hide(record: dict[str, Any]) -> None:
    said = words.verdict(record)
    assert "No difference seen at this size (could hide a loss of up to 3.0 points)" in said
    assert "about 3,138 problems would show a loss of 1 point" in said
    record["models"][1]["certainty"] = certainty(-0.03, 0.001)
    assert "A loss of 3.0 points (95 % interval -4.0 to -2.0, p = 0.001)" in words.verdict(record)
    record["models"][1]["certainty"] = certainty(0.03, 0.001)
    assert "A gain of 3.0 points" in words.verdict(record)


def test_a_reference_at_the_floor_is_no_headline(record: dict[str, Any]) -> None:
    for model in record["models"]:
        model["metrics"]["exact_match"] = 0.0
    said = words.verdict(record)
    assert "teacher itself solves 0.0 % of 200 problems: too few to show what was lost" in said
    assert "keeps" not in said
    assert not [fact for fact in words.facts(record) if fact[0] == "Exact match"]
    assert "Exact match against size" not in page.page(record)
    record["models"][0]["metrics"]["exact_match"] = 0.05
    assert proof.floor(record) is None
    record["suite"]["problems"] = 20  # one right answer
    assert "solves 5.0 % of 20 problems" in str(proof.floor(record))


def test_every_table_stands_in_markdown_and_page(record: dict[str, Any]) -> None:
    text, html = markdown(record), page.page(record)
    for title in (
        "Is the difference real?",
        "How answers came about",
        "Where KL sits",
        "Speed",
        "Answers that changed",
    ):
        assert title in text
        assert title in html
    assert "<i>q" not in html
    assert "so <b>" not in html
    assert "70.0 %" in text
    assert "2.80 ×" in text
    assert [fact for fact in words.facts(record) if fact[:2] == ("Decode speed", "2.80 ×")]


def test_speeds_of_the_evaluations_own_loop_are_not_compared(
    record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    show._record(record)
    assert "tok/s" in capsys.readouterr().out
    for model, rate in zip(record["models"], (80.0, 27.0), strict=True):
        del model["speed"]
        model["metrics"]["decode_tokens_per_s"] = rate
    assert [line[3:5] for line in proof.speed_rows(record).rows] == [["80", "–"], ["27", "–"]]
    show._record(record)
    assert "tok/s" not in capsys.readouterr().out


def test_conditions(record: dict[str, Any]) -> None:
    def failing(*texts: str) -> list[str]:
        return [error.what for error in gate.failures(record, [gate.parse(text) for text in texts])]

    assert failing("exact_match < -1.0") == ["small: exact_match is -3, and exact_match < -1 fails"]
    assert failing("exact_match < -3.1", "kl_divergence > 0.05", "kl_p99 > 0.3", "bytes > 0.5") == []
    assert len(failing("bytes >= 0.4", "decode_tokens_per_s < 3", "top1_agreement<=-5")) == 3
    assert failing("perplexity > 1.1") == ["perplexity > 1.1: not measured in these reports"]
    for bad in ("", "exact_match", "exact_match < x", "exact_match == 1", "exact_match < -1; rm", "nothing < 1"):
        with pytest.raises(DscError, match="--fail-if"):
            gate.parse(bad)


def test_the_pareto_front(record: dict[str, Any]) -> None:
    record["models"].append(row("worse", 500, 0.4))
    assert gate.pareto(record) == {"teacher", "small"}
    record["models"].append(row("best", 300, 0.6))
    assert gate.pareto(record) == {"best"}


def test_the_spreadsheet(record: dict[str, Any]) -> None:
    record["models"][1]["name"] = "=HYPERLINK(1)"
    rows = list(csv.DictReader(io.StringIO(csv_text(record))))
    assert rows[1]["name"] == "'=HYPERLINK(1)"
    assert (rows[1]["exact_match"], rows[1]["lost"], rows[1]["runtime"]) == ("0.47", "9", "onnxruntime")
    assert rows[0]["lost"] == ""


def test_several_runs_are_corrected_together(record: dict[str, Any], tmp_path: Path) -> None:
    for number, p in enumerate((0.02, 0.03)):
        record["models"][1] = {**record["models"][1], "name": f"m{number}", "certainty": certainty(-0.02, p)}
        record["recipe"] = f"stages: []\nseed: {number}\n"
        (tmp_path / f"{number}.json").write_text(json.dumps(record))
    found = compare([tmp_path / "0.json", tmp_path / "1.json"], tmp_path / "both.csv")
    by_name = {model["name"]: model for model in table.everything(found)}
    assert [by_name[name]["certainty"]["p_holm"] for name in ("m0", "m1")] == [0.04, 0.04]
    assert any("seed: 0 -> seed: 1" in note for note in found["notes"])
    assert {path.suffix for path in tmp_path.glob("both.*")} == {".csv", ".html", ".json", ".md"}
    assert compare([tmp_path / "0.json"], None)["name"] == "comparison"


def test_blocks_of_which_nothing_is_known_give_no_row() -> None:
    model = {"name": "a", "experts_by_layer": [None, None], "outliers_by_layer": [None, None]}
    record: dict[str, Any] = {"models": [model]}

    assert errors.expert_rows(record).rows == []
    assert errors.outlier_rows(record).rows == []

"""The command line over calibration text: a mix, a choice from a pool, saved statistics; each mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from tests.house.conftest import Dsc
from tests.house.short import TEXT


@pytest.fixture
def table(text: Path, tmp_path: Path) -> Path:
    rows = [json.loads(line) for line in text.read_text().splitlines()]
    columns = {key: [row[key] for row in rows] for key in rows[0]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "b.parquet")
    return tmp_path / "b.parquet"


def manifest(out: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(out, "dsc_manifest.json").read_text())["calibration"]
    return found


def test_a_mix_from_the_command_line(dsc: Dsc, tiny_llama: Path, text: Path, table: Path) -> None:
    words = ["--samples", "10", "--length", "16", "--calibration", f"{text}=0.7", "--calibration", f"{table}=0.3"]
    done = dsc("quantize", tiny_llama, "-o", "q", *words)
    assert done.exit_code == 0, done.output
    found = manifest("q")
    assert [(s["name"], s["share"], s["tokens"]) for s in found["sources"]] == [
        ("text.jsonl", 0.7, 112),
        ("b.parquet", 0.3, 48),
    ]
    assert all(len(digest) == 64 for s in found["sources"] for digest in s["files"].values())
    mixed = dsc("quantize", tiny_llama, "-o", "r", "--calibration", f"{text}=0.7", "--calibration", table)
    assert mixed.exit_code == 1
    assert f"{table}: no share, though others have one" in mixed.stderr


def test_saved_and_taken_up(dsc: Dsc, tiny_llama: Path, text: Path) -> None:
    done = dsc("calibrate", tiny_llama, "-o", "st", *TEXT, "--calibration", text)
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1] == f"next: dsc quantize {tiny_llama} -o OUT --statistics st"
    done = dsc("quantize", tiny_llama, "-o", "q", "--statistics", "st", "--set", "weights.gptaq.num_bits=3")
    assert done.exit_code == 0, done.output
    assert manifest("q")["samples"] == 2
    assert (
        dsc("quantize", tiny_llama, "-o", "q", "--statistics", "st", "--set", "weights.gptaq.num_bits=3").exit_code == 0
    )
    wrong = dsc("quantize", tiny_llama, "-o", "r", "--statistics", "st", "--samples", "3")
    assert wrong.exit_code == 1
    assert wrong.stderr.splitlines() == [
        "error: calibration: st: made with samples 2, now 3; leave samples out, or run dsc calibrate again"
    ]
    assert not Path("r").exists()


def test_a_choice_is_planned(dsc: Dsc, tiny_v3: Path, tiny_llama: Path, text: Path) -> None:
    words = ["--calibration", text, "--samples", "2", "--length", "16", "--group-size", "32", "--json"]

    def plan(*more: str) -> dict[str, Any]:
        done = dsc("plan", tiny_v3, *words, *more)
        assert done.exit_code == 0, done.output
        (row,) = json.loads(done.stdout)["stages"]
        return dict(row)

    assert plan("--set", "calibration.select.from=9")["memory"] > plan()["memory"]
    dense = dsc("plan", tiny_llama, *words[:-1], "--set", "calibration.select={from: 9, balance: true}")
    assert dense.exit_code == 1
    assert "the model has no experts; leave it out" in dense.stderr


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("calibration.selct=1", "did you mean 'select'? valid knobs: length, samples, select, sources, statistics"),
        ("calibration.select={from: 9, alfa: 1}", "did you mean 'alpha'? valid knobs: alpha, balance, beta, from"),
        ("calibration.select.from=3", "recipe.calibration: select: 64 samples cannot be chosen from 3 windows"),
        ("calibration.statistics=none", "none: no statistics in it; give a directory that dsc calibrate wrote"),
    ],
)
def test_a_mistake_is_one_line(dsc: Dsc, tiny_v3: Path, setting: str, words: str) -> None:
    done = dsc("plan", tiny_v3, "--group-size", "32", "--set", setting)
    assert done.exit_code == 1
    assert words in done.stderr

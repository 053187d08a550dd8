"""The main job, whole: what the built-in model loses and gains on its way from teacher to engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.house.conftest import Dsc

NAMES = ["teacher", "teacher-w4a16", "student", "student-sparse24", "student-sparse24-w4a8"]


@pytest.mark.verify
def test_the_quickstart_keeps_its_promises(dsc: Dsc) -> None:
    done = dsc("run", "quickstart", "--json")
    assert done.exit_code == 0, done.output
    out = Path("runs/quickstart")
    record = json.loads((out / "report.json").read_text())
    models = {model["name"]: model for model in record["models"]}
    assert list(models) == NAMES
    assert record["reference"] == "teacher"
    exact = {name: model["metrics"]["exact_match"] for name, model in models.items()}
    assert exact["teacher"] >= 0.9
    assert exact["teacher-w4a16"] >= 0.98 * exact["teacher"]
    assert exact["student-sparse24-w4a8"] >= 0.9 * exact["teacher"]
    last = models["student-sparse24-w4a8"]
    assert last["bytes"] <= 2 * models["teacher"]["parameters"] / 4
    assert [row["name"] for row in record["ablations"]] == ["student-oneshot24"]
    engines = [row for row in record["artifacts"] if row["target"] == "tensorrt-rtx"]
    assert engines
    assert all(Path(row["path"]).stat().st_size > 100_000 for row in engines)
    checked = json.loads((out / "onnx" / "dsc_run.json").read_text())["facts"]["verification"]
    assert checked["holds"]
    page = (out / "report.html").read_text()
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "<script src" not in page

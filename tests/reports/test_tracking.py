"""A comparison reaches MLflow's own client: its file store holds what the reports say; a dead server is one line."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from deepseek_compress.errors import DscError
from deepseek_compress.reports import files, tracking
from deepseek_compress.reports.table import Record
from tests.reports.sample_record import record as sample

pytest.importorskip("mlflow")


@pytest.fixture
def record() -> Record:
    return sample(3)


def test_one_run_a_model_with_its_figures(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    page = tmp_path / "compare.html"
    files.write(record, page)

    assert tracking.log(record, (tmp_path / "runs").as_uri(), page) == 3

    runs = {path.parent.parent.joinpath("tags/mlflow.runName").read_text(): path.parent.parent
            for path in (tmp_path / "runs").rglob("params/about")}  # fmt: skip
    assert set(runs) == {model["name"] for model in record["models"]}
    for model in record["models"]:
        run = runs[model["name"]]
        found = {path.name: float(path.read_text().split()[1]) for path in (run / "metrics").iterdir()}
        assert found == dict(tracking.metrics(model))
        assert found["bytes"] == model["bytes"] and found["exact_match"] == model["metrics"]["exact_match"]
        assert json.loads((run / "artifacts/report.json").read_text()) == model
        assert (run / "artifacts/compare.html").read_bytes() == page.read_bytes()


def test_speed_is_that_of_the_deployed_file() -> None:
    model = sample(1)["models"][0] | {"speed": {"runtime": "onnxruntime", "decode_tokens_per_s": 512.0}}

    assert dict(tracking.metrics(model))["decode_tokens_per_s"] == 512.0


def test_a_dead_server_is_one_line(record: Record) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"  # bound, not listening: refused

        with pytest.raises(DscError, match=uri) as caught:
            tracking.log(record, uri, None)

    assert "\n" not in caught.value.what

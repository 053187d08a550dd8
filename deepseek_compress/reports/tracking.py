"""Log a comparison to an MLflow tracking server: one run a model, in the experiment `dsc`.

Parameters say what the model is, metrics are those of report.json (besides `kl_p99` and the deployed file's speed),
artifacts are the model's part of the record and the page. The package is mlflow-skinny, the client of a server; a
database named directly (`sqlite:///runs.db`) takes the whole of mlflow.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deepseek_compress.errors import DscError
from deepseek_compress.reports import proof
from deepseek_compress.reports.table import Model, Record

EXPERIMENT = "dsc"
# The client's own defaults try for minutes, and send usage figures to its makers.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
SPEED = ("prefill_tokens_per_s", "decode_tokens_per_s", "first_token_s", "token_p95_s", "cpu_seconds_per_token")


def client() -> Any:
    """Return the module `mlflow`. Raises `DscError` with the extra to install."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        return importlib.import_module("mlflow")
    except ModuleNotFoundError:
        raise DscError("--mlflow: mlflow is not installed", "pip install 'deepseek-compress[mlflow]'") from None


def log(record: Record, uri: str, page: Path | None) -> int:
    """Log every model of `record` to the server at `uri`. Returns how many; raises `DscError` with what it answered."""
    mlflow = client()
    try:
        mlflow.set_tracking_uri(uri)
        mlflow.set_experiment(EXPERIMENT)
        for model in record["models"]:
            with mlflow.start_run(run_name=model["name"]):
                mlflow.log_params(dict(parameters(record, model)))
                mlflow.log_metrics(dict(metrics(model)))
                mlflow.log_dict(dict(model), "report.json")
                if page is not None:
                    mlflow.log_artifact(str(page))
    except (mlflow.exceptions.MlflowException, OSError, ValueError) as error:
        what = f"--mlflow {uri}: {str(error).splitlines()[0][:300]}"
        raise DscError(what, "check the address and that the server runs") from None
    return len(record["models"])


def parameters(record: Record, model: Model) -> Iterator[tuple[str, str]]:
    """Yield what the model is and what it was compared with."""
    yield "about", model.get("about") or ""
    yield "path", model["path"]
    yield "reference", record.get("reference") or ""
    yield "stages", " -> ".join(str(step.get("stage")) for step in model["lineage"])


def metrics(model: Model) -> Iterator[tuple[str, float]]:
    """Yield every figure that was measured; speeds are those of the file's own runtime where it was timed there."""
    speed = proof.speed(model) or {}
    found = {
        **model["metrics"],
        "bytes": model["bytes"],
        "bits_per_weight": model["bits_per_weight"],
        "kl_p99": (model.get("kl") or {}).get("p99"),
        **{key: speed[key] for key in SPEED if key in speed},
    }
    yield from ((key, float(value)) for key, value in found.items() if value is not None and math.isfinite(value))

"""Put a run record on disk: JSON for programs, Markdown and HTML for people, all three from the same record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepseek_compress.checkpoint.files import read_json, write_file
from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.reports import logs
from deepseek_compress.reports.markdown import markdown
from deepseek_compress.reports.page import page
from deepseek_compress.reports.schema import METRICS, mistyped
from deepseek_compress.reports.spreadsheet import csv_text
from deepseek_compress.reports.table import Record

SCHEMA = 1
TOP = ("schema", "reference", "models", "artifacts", "machine", "versions")
MODEL = ("name", "path", "bytes", "bits_per_weight", "parameters", "metrics", "intervals", "lineage")
ARTIFACT = ("name", "target", "path", "bytes", "status")


def write(record: Record, path: Path) -> list[Path]:
    """Write `path` with the suffixes .json, .md and .html, and .csv where `path` has it. Returns the paths.

    Each is written to a temporary file and renamed. Raises `ValueError` for a record that lacks a key or holds an
    infinity: a defect of ours, never the user's.
    """
    missing = lacking(record)
    if missing:
        raise ValueError(f"the record lacks {', '.join(missing)}")
    contents = {
        ".json": json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        ".md": markdown(record),
        ".html": page(record),
    }
    if path.suffix == ".csv":
        contents[".csv"] = csv_text(record)
    written = []
    for suffix, content in contents.items():
        target = path.with_suffix(suffix)
        write_file(target, content.encode("utf-8"))
        written.append(target)
    return written


def read(path: Path) -> dict[str, Any]:
    """Read the record of a report.json, of the one next to a .html or .md, or of another harness's log.

    Raises `DscError` where there is none.
    """
    if path.suffix == ".eval":
        return logs.read_archive(path)
    path = path.with_suffix(".json") if path.suffix in {".html", ".md"} else path
    path = path / "report.json" if path.is_dir() else path
    try:
        record = read_json(path)
    except DscError as error:
        raise DscError(error.what, "give a report.json that dsc wrote") from None
    if logs.is_log(record):
        return logs.record_of(record, path)
    if record.get("schema") != SCHEMA:
        what = f"{path}: schema {str(record.get('schema'))[:40]}, this version reads {SCHEMA}"
        raise DscError(what, "evaluate again")
    raise_problems(DscError(problem, "evaluate again") for problem in mistyped(record, str(path)))
    raise_problems(DscError(f"{path}: lacks {name}", "evaluate again") for name in lacking(record))
    return record


def lacking(record: Mapping[str, Any]) -> list[str]:
    """Every key of the schema that is not there: `models[0].metrics.f1`."""
    found = [name for name in TOP if name not in record]
    if found:
        return found
    rows = [("models", record["models"], MODEL), ("ablations", record.get("ablations") or [], MODEL)]
    for where, items, names in [*rows, ("artifacts", record["artifacts"], ARTIFACT)]:
        for index, item in enumerate(items):
            found += [f"{where}[{index}].{name}" for name in names if name not in item]
            if "metrics" in item:
                found += [f"{where}[{index}].metrics.{name}" for name in METRICS if name not in item["metrics"]]
    return found

"""One report over many runs: the models of several records side by side.

Nothing is measured again. What a model keeps of its reference was computed in its own run, on that run's problems;
where runs asked different problems, had different text or other machines, the page says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_compress import limits
from deepseek_compress.errors import DscError
from deepseek_compress.reports import files, logs

SAME = ("suite", "text", "machine", "versions")  # what must agree before numbers may be compared without a word


def compare(paths: Sequence[Path], out: Path | None) -> dict[str, Any]:
    """Read the report.json files at `paths`, write one report to `out` (.html or .csv, with .json and .md).

    Returns the record; `out` None writes nothing. Raises `DscError` for a file that is no report, for none at all, and
    where `out` is one of the inputs, or a page that `dsc` did not write.
    """
    if out is not None:
        _check_page(out)
    if not paths:
        raise DscError("no reports to compare", "give at least one report.json")
    suffixes = (".json", ".md", ".html", ".csv")
    outputs = {out.with_suffix(suffix).resolve() for suffix in suffixes} if out is not None else set()
    for path in paths:
        if (path / "report.json" if path.is_dir() else path).resolve() in outputs:
            raise DscError(f"{path}: would be overwritten by {out}", "choose another -o")
    if len(paths) > limits.REPORTS:
        raise DscError(f"{len(paths)} reports, {limits.REPORTS} at most are compared", "give fewer")
    records = [files.read(path) for path in paths]
    logs.paired(records)
    record = merge(records, _names(paths))
    correct_again(record)
    record["name"] = out.stem if out is not None else "comparison"
    if out is not None:
        files.write(record, out)
    return record


def _check_page(out: Path) -> None:
    if out.suffix not in (".html", ".csv"):
        raise DscError(f"-o {out}: not a .html or .csv file", "name the page, for instance -o compare.html")
    for page in (out.with_suffix(suffix) for suffix in sorted({".html", ".md", ".json", out.suffix})):
        if page.exists() and not _is_report(out.with_suffix(".json")):
            raise DscError(f"{page}: exists and was not written by dsc", "choose another -o")


def _is_report(path: Path) -> bool:
    try:
        return bool(files.read(path))
    except DscError:
        return False


def correct_again(record: Mapping[str, Any]) -> None:
    """Holm's correction over all models that stand in one table, whatever each report's own was."""
    found = [row["certainty"] for row in _rows(record) if row.get("certainty")]
    order, largest = sorted(found, key=lambda one: one["p"]), 0.0
    for rank, one in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * one["p"]))
        one["p_holm"] = largest


def merge(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """One record of all models, in the order of the records; `names[i]` tells record i's models from another's.

    A model's name is kept where no other run has it; otherwise it becomes `run/model`. A model that two runs measured
    with equal results appears once.
    """
    models: list[dict[str, Any]] = []
    ablations: list[dict[str, Any]] = []
    artifacts: list[dict[str, Any]] = []
    for record, run in zip(records, names, strict=True):
        clashing = _clashing(records, record)
        for target, rows in ((models, record["models"]), (ablations, record.get("ablations") or [])):
            for row in rows:
                if not any(_equal(row, other) for other in target):
                    target.append({**row, "name": f"{run}/{row['name']}" if row["name"] in clashing else row["name"]})
        artifacts += [
            {**row, "name": f"{run}/{row['name']}" if len(records) > 1 else row["name"]} for row in record["artifacts"]
        ]
    if len(models) + len(ablations) > limits.MODELS:
        raise DscError(f"{len(models)} models, {limits.MODELS} at most are compared", "give fewer reports")
    first = records[0]
    same = {key: first.get(key) if all(r.get(key) == first.get(key) for r in records) else None for key in SAME}
    return {
        "schema": files.SCHEMA,
        "reference": _reference(records, models),
        "models": models,
        "artifacts": artifacts,
        "machine": same["machine"] or {},
        "versions": same["versions"] or {},
        "ablations": ablations,
        "suite": same["suite"],
        "text": same["text"],
        "sources": list(names),
        "recipes": _recipes(records, names),
        "notes": [
            *_same_moment(records),
            *_recipe_notes(records, names),
            *_differences(records, names),
            *_notes(records, names),
        ],
    }


def _names(paths: Sequence[Path]) -> list[str]:
    """Choose a short name of each report: its file's name, or its directory's when the file is plain report.json."""
    found: list[str] = []
    for path in paths:
        file = path / "report.json" if path.is_dir() else path
        name = file.resolve().parent.name if file.stem == "report" else file.stem
        same = sum(1 for other in found if other == name or other.startswith(f"{name}-"))
        found.append(f"{name}-{same + 1}" if same else name)
    return found


def _clashing(records: Sequence[Mapping[str, Any]], mine: Mapping[str, Any]) -> set[str]:
    """Names in `mine` that another record gives to something else."""
    others = [row for record in records if record is not mine for row in _rows(record)]
    return {
        row["name"]
        for row in _rows(mine)
        for other in others
        if row["name"] == other["name"] and not _equal(row, other)
    }


def _rows(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*record["models"], *(record.get("ablations") or [])]


def _equal(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compare two models' results; speeds and peaks differ from run to run and do not count."""
    fixed = ("bytes", "parameters", "lineage")
    deterministic = ("exact_match", "f1", "valid_steps", "perplexity", "kl_divergence", "top1_agreement")
    return (
        str(row["name"]).rpartition("/")[2] == str(other["name"]).rpartition("/")[2]
        and all(row[key] == other[key] for key in fixed)
        and all(row["metrics"][key] == other["metrics"][key] for key in deterministic)
    )


def _reference(records: Sequence[Mapping[str, Any]], models: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the reference that all runs share, None where they have different ones."""
    rows: list[Mapping[str, Any]] = []
    for record in records:
        if record.get("log") and record["reference"] is None:
            continue
        row = next((model for model in record["models"] if model["name"] == record["reference"]), None)
        if row is None or (rows and not _equal(row, rows[0])):
            return None
        rows.append(row)
    return next((str(model["name"]) for model in models if rows and _equal(model, rows[0])), None)


def _differences(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    words = {
        "suite": "other problems were asked: exact match, F1 and valid steps are not comparable between runs",
        "text": "other tokens were predicted: perplexity, KL and top-1 are not comparable between runs",
        "machine": "another machine: speed and memory are not comparable between runs",
        "versions": "other versions of the software",
    }
    found = []
    for key in SAME:
        other = [n for n, record in zip(names, records, strict=True) if record.get(key) != records[0].get(key)]
        if other:
            found.append(f"{', '.join(other)} against {names[0]}: {words[key]}.")
    return found


def _recipes(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> dict[str, str]:
    return {name: str(record["recipe"]) for name, record in zip(names, records, strict=True) if record.get("recipe")}


def _recipe_notes(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """List the lines in which the recipes of two runs differ, the first run's against each other's."""
    found, first = [], [line.strip() for line in str(records[0].get("recipe") or "").splitlines()]
    for name, record in zip(names[1:], records[1:], strict=True):
        lines = [line.strip() for line in str(record.get("recipe") or "").splitlines()]
        gone = [line for line in first if line and line not in lines]
        new = [line for line in lines if line and line not in first]
        if gone or new:
            words = f"{' | '.join(gone)[:300] or 'nothing'} -> {' | '.join(new)[:300] or 'nothing'}"
            found.append(f"Recipes, {names[0]} -> {name}: {words}.")
    return found


def _same_moment(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Speeds of several runs were taken at several moments."""
    timed = [
        r
        for r in records
        if any((row["metrics"] or {}).get("decode_tokens_per_s") or row.get("speed") for row in _rows(r))
    ]
    if len(timed) < 2:
        return []
    return ["Speeds were measured in several runs: compare each with its own run's reference, not with each other's."]


def _notes(records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    return [
        f"{name}: {note}" for name, record in zip(names, records, strict=True) for note in record.get("notes") or []
    ]

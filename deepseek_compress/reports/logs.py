"""Logs of other harnesses as records: lm-evaluation-harness's results_*.json and Inspect's .json or .eval.

Each log is one model. A task is a family of problems; exact match is the mean over all problems, whatever task they are
of. Where a log has every problem's score (lm-eval writes samples_*.jsonl too with --log_samples), models can be
compared problem by problem: `paired` does that against the first log.

Left out: what such a log says besides scores. Tasks without a score of right or wrong (perplexity, BLEU) are named in a
note.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_compress import limits
from deepseek_compress.checkpoint.files import read_bytes
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation import certainty
from deepseek_compress.evaluation.statistics import wilson
from deepseek_compress.reports.schema import METRICS

FIX = "give a results_*.json of lm-eval or a log of Inspect"
#: metrics that say right or wrong, the first that a task has
RIGHT = ("exact_match", "acc", "acc_norm", "pass@1", "mc2")
GRADES = {"C": 1.0, "I": 0.0, "P": 0.5, "N": 0.0}  # Inspect's correct, incorrect, partial, no answer
SCORES = "scores"  # {task: {problem: score}} of a record, in memory only

Scores = dict[str, dict[str, float]]


def is_log(document: Any) -> bool:
    """Whether a JSON document is a log of one of the two."""
    if not isinstance(document, Mapping):
        return False
    return _is_harness(document) or _is_inspect(document)


def read_archive(path: Path) -> dict[str, Any]:
    """Read the record of an Inspect log of the form .eval, a zip. Raises DscError for anything else."""
    try:
        with zipfile.ZipFile(path) as archive:
            document = json.loads(_member(archive, "header.json", path))
            names = [name for name in archive.namelist() if name.startswith("samples/") and name.endswith(".json")]
            if len(names) > limits.SAMPLES:
                raise DscError(f"{path}: {len(names):,} samples, {limits.SAMPLES:,} at most are read", "split the log")
            document["samples"] = [json.loads(_member(archive, name, path)) for name in sorted(names)]
    except (zipfile.BadZipFile, KeyError, ValueError, OSError, RecursionError, NotImplementedError) as error:
        raise DscError(f"{path}: not a log of Inspect ({type(error).__name__})", FIX) from None
    return record_of(document, path)


def _member(archive: zipfile.ZipFile, name: str, path: Path) -> bytes:
    """Read a file of the archive, of bounded size whatever its header says."""
    with archive.open(name) as file:
        content = file.read(limits.JSON_BYTES + 1)
    if len(content) > limits.JSON_BYTES:
        raise DscError(f"{path}: {name} has more than {limits.JSON_BYTES >> 20} MiB", FIX)
    return content


def record_of(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Convert a log to a record. Raises DscError where a part of it is missing or of another form."""
    try:
        if _is_harness(document):
            return _harness(document, path)
        return _inspect(document, path)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = f"{path}: a log without {error}" if isinstance(error, KeyError) else f"{path}: a log of another form"
        raise DscError(what, FIX) from None


def _is_harness(document: Mapping[str, Any]) -> bool:
    return isinstance(document.get("results"), Mapping) and "configs" in document


def _is_inspect(document: Mapping[str, Any]) -> bool:
    return isinstance(document.get("eval"), Mapping) and "status" in document


def _harness(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """lm-evaluation-harness: {"results": {task: {"metric,filter": value}}, "n-samples": {task: {"effective": n}}}."""
    means, counts, scores, left = {}, {}, {}, []
    groups = set(document.get("groups") or {})
    for task, found in document["results"].items():
        key = next((k for name in RIGHT for k in found if k.partition(",")[0] == name), None)
        if task in groups or key is None:
            left += [] if task in groups else [str(task)]
            continue
        metric, _, chosen = key.partition(",")
        means[str(task)] = float(found[key])
        counts[str(task)] = int(document["n-samples"][task]["effective"])
        scores[str(task)] = _samples(path, str(task), metric, chosen)
    config = document.get("config") or {}
    name = document.get("model_name") or config.get("model_args") or config.get("model") or path.stem
    about = f"lm-evaluation-harness {document.get('lm_eval_version') or ''}".strip()
    return _record(str(name), about, means, counts, scores, left, path)


def _samples(path: Path, task: str, metric: str, chosen: str) -> dict[str, float]:
    """Read the score of each problem from samples_TASK_*.jsonl next to the results; nothing where there is none."""
    files = sorted(file for file in path.parent.glob("samples_*.jsonl") if file.name.startswith(f"samples_{task}_"))
    same = [file for file in files if file.stem.rpartition("_")[2] == path.stem.partition("_")[2]] or files[-1:]
    if not same:
        return {}
    lines = read_bytes(same[-1], limits.TEXT_BYTES).decode("utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.strip()]
    return {str(row["doc_id"]): float(row[metric]) for row in rows if row.get("filter", chosen) == chosen}


def _inspect(document: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Inspect: {"eval": {"task", "model"}, "results": {"scores": [...]}, "samples": [{"id", "epoch", "scores"}]}."""
    if document["status"] != "success":
        raise DscError(
            f"{path}: status {str(document['status'])[:40]!r}", "give the log of an evaluation that ended well"
        )
    task, found = str(document["eval"]["task"]), document["results"]["scores"][0]
    values = [value["value"] for key, value in found["metrics"].items() if key in ("accuracy", "mean")]
    scores: dict[str, list[float]] = {}
    for sample in document.get("samples") or []:
        grade = ((sample.get("scores") or {}).get(found["name"]) or {}).get("value")
        value = GRADES.get(grade) if isinstance(grade, str) else float(grade) if grade is not None else None
        if value is not None:
            scores.setdefault(str(sample["id"]), []).append(value)  # epochs of one problem are one score
    means = {key: sum(rows) / len(rows) for key, rows in scores.items()}
    mean = float(values[0]) if values else sum(means.values()) / len(means)
    count = len(means) or int(document["results"]["completed_samples"])
    return _record(str(document["eval"]["model"]), "Inspect", {task: mean}, {task: count}, {task: means}, [], path)


def _record(
    name: str, about: str, means: Mapping[str, float], counts: Mapping[str, int], scores: Scores, left: Sequence[str],
    path: Path,
) -> dict[str, Any]:  # fmt: skip
    problems = sum(counts.values())
    if not means or not problems:
        raise DscError(f"{path}: no task of it scores answers as right or wrong", "give one with exact_match or acc")
    if not all(0 <= value <= 1 for value in means.values()):
        raise ValueError("a share outside of 0 to 1")
    exact = sum(means[task] * counts[task] for task in means) / problems
    row: dict[str, Any] = {
        "name": name, "path": str(path), "bytes": None, "parameters": None, "bits_per_weight": None, "about": about,
        "metrics": {**dict.fromkeys(METRICS), "exact_match": exact}, "lineage": [],
        "intervals": {"exact_match": list(wilson(exact * problems, problems))},
        "families": {task: {"exact_match": value, "problems": counts[task]} for task, value in means.items()},
    }  # fmt: skip
    notes = [f"{name}: read from a log of {about}."]
    notes += [f"{name}: tasks without right or wrong were left out: {', '.join(left)}."] if left else []
    return {
        "schema": 1, "name": name, "reference": name, "models": [row], "artifacts": [], "machine": {}, "versions": {},
        "suite": {"name": ", ".join(means), "problems": problems, "families": dict(counts)}, "text": None,
        "notes": notes, "log": True, SCORES: scores if all(scores.values()) else {},
    }  # fmt: skip


def paired(records: Sequence[dict[str, Any]]) -> None:
    """Compare the models of logs with the first log's, problem by problem, where both have every problem's score.

    Takes the scores out of the records: what is written has none. Beside reports of ours nothing is compared.
    """
    found = [(record, record.pop(SCORES)) for record in records if SCORES in record]
    for record, _ in found[0 if len(found) < len(records) else 1 :]:
        record["reference"] = None  # a log is among them; the first of nothing but logs is what they are compared with
    if len(found) < 2 or len(found) < len(records):
        return
    first, theirs = found[0]
    for record, mine in found[1:]:
        row, before = record["models"][0], first["models"][0]
        ratio = before["metrics"]["exact_match"]
        row["relative"] = {"exact_match": row["metrics"]["exact_match"] / ratio if ratio else None}
        common = [(task, key) for task in mine for key in mine[task] if key in theirs.get(task, {})]
        if common and len(common) == record["suite"]["problems"] == first["suite"]["problems"]:
            mine_here, theirs_here = ([side[task][key] for task, key in common] for side in (mine, theirs))
            known = certainty.paired(mine_here, theirs_here)
            row["certainty"] = {**known, "interval": list(known["interval"])}
        else:
            why = "scores of single problems are not in both logs, or of other problems"
            record["notes"].append(f"{row['name']}: not compared with {before['name']} problem by problem: {why}.")

"""Mixed precision on the built-in model: 3.5 bits per weight by measurement against uniform bits.

    python -m benchmarks.mixed_precision [--problems 2000] [--scratch DIR]

`dsc allocate` searches twice, once with every loss measured (`kl`), once with all of them estimated from gradients
(`fisher`); what it writes is run by `dsc quantize`, beside uniform 3 bits in groups of 32 (3.6 bits per weight) and
uniform 4 bits, all by GPTQ on the same 64 x 512 tokens. Judged on problems of the test split: KL to the original over
windows of text and, for uniform 4 bits, exact match on the same problems as the original, with the paired
interval of the difference. Bars: the mixed recipe takes at most 3.5 bits per weight and has less KL than uniform 3
bits; uniform 4 bits stay within 1 point of the original's exact match over at least 2,000 problems. Both searches are
compared: rank correlation of their losses, and the KL of the result. With `--scratch` finished steps are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, measure, present
from deepseek_compress import tasks
from deepseek_compress.checkpoint.files import read_json
from deepseek_compress.evaluation.record import Settings, evaluate
from deepseek_compress.models.resolve import resolve_model

MODEL, TARGET, POINTS = "builtin:nano", "3.5 bits per weight", 0.01
WINDOWS, LENGTH, HELD = 32, 512, 700  # judged windows, their tokens, problems that make the text
OPTIONS = "options=[{num_bits: 2}, {num_bits: 3}, {num_bits: 4}, {num_bits: 5}, {num_bits: 6}]"
SEARCHES = {
    "kl": ["--set", OPTIONS, "--set", "windows=8", "--workers", "2"],
    "fisher": ["--set", OPTIONS, "--set", "method=fisher", "--set", "windows=32"],
}
MODELS = {
    "uniform 4 bits": ["-r", "w4a16"],
    "uniform 3 bits, groups of 32": ["-r", "w4a16", "--group-size", "32", "--set", "weights.gptaq.num_bits=3"],
    "mixed, losses measured": ["-r", "{scratch}/kl/recipe.yaml"],
    "mixed, losses from gradients": ["-r", "{scratch}/fisher/recipe.yaml"],
}
COLUMNS = (
    "model", "bits per weight", "MB", "KL", "KL, 95 %", "top-1", "exact match", "points from the original", "CPU s",
)  # fmt: skip


def dsc(scratch: Path, name: str, *words: str) -> float:
    """Run a command whose output is `name`, unless it ran; its CPU seconds, imports included."""
    kept = scratch / f"{name}.seconds"
    if not kept.exists():
        cost = measure([sys.executable, "-m", "deepseek_compress", *words, "-o", str(scratch / name)], cwd=ROOT)
        if cost.returncode:
            raise SystemExit(f"dsc {' '.join(words)} failed:\n{cost.output[-3000:]}")
        kept.write_text(f"{cost.cpu_s:.1f}")
    return float(kept.read_text())


def searches(scratch: Path) -> tuple[dict[str, float], dict[str, Any]]:
    """CPU seconds of both searches, and how their losses agree."""
    from scipy.stats import spearmanr

    seconds = {
        name: dsc(scratch, name, "allocate", MODEL, "--target", TARGET, *knobs) for name, knobs in SEARCHES.items()
    }
    tables = {name: read_json(scratch / name / "sensitivity.json") for name in SEARCHES}
    losses = {name: [[o["kl"] for o in unit["options"]] for unit in t["units"]] for name, t in tables.items()}
    count = len(losses["kl"][0])
    rank = {
        option["scheme"]: float(spearmanr(*([loss[i] for loss in losses[name]] for name in SEARCHES)).statistic)
        for i, option in zip(range(count), tables["kl"]["units"][0]["options"], strict=True)
    }
    flat = spearmanr(*([x for loss in losses[name] for x in loss] for name in SEARCHES)).statistic
    facts = {f"{name}: {key}": tables[name][key] for name in SEARCHES for key in ("predicted_kl", "measured_kl")}
    facts |= {"units": len(losses["kl"]), "rank correlation, all losses": float(flat)}
    return seconds, {**facts, "rank correlation, units at one option": rank}


def held(scratch: Path) -> Path:
    """Text of the test split, of other problems than those that are asked."""
    path = scratch / "held.txt"
    problems = tasks.mixture(7, HELD, "test")
    path.write_text(" ".join(f"{p.prompt} {p.solution} <eos>" for p in problems), encoding="utf-8")
    return path


def judged(scratch: Path, problems: int) -> dict[str, Any]:
    """Name -> row of the record: KL of all models, exact match of the original and of uniform 4 bits."""
    paths = {"original": resolve_model(MODEL), **{name: scratch / folder(name) for name in MODELS}}
    text = Settings(suite=None, text=held(scratch), windows=WINDOWS, length=LENGTH, efficiency=False)
    rows = {row["name"]: row for row in evaluate(paths, "original", text)["models"]}
    asked = {name: paths[name] for name in ("original", "uniform 4 bits")}
    for row in evaluate(asked, "original", Settings(problems=problems, efficiency=False))["models"]:
        mine = rows[row["name"]]
        mine["metrics"]["exact_match"] = row["metrics"]["exact_match"]
        mine["intervals"] |= {key: v for key, v in row["intervals"].items() if key.startswith("exact_match")}
    return rows


def folder(name: str) -> str:
    """Where a model lies."""
    return name.replace(",", "").replace(" ", "-")


def line(name: str, row: dict[str, Any], scratch: Path, seconds: float | None, original: float) -> list[Any]:
    """A row of the table."""
    run = scratch / folder(name) / "dsc_run.json"
    bits = json.loads(run.read_text())["facts"]["bits_per_weight"] if run.exists() else None
    metrics, intervals = row["metrics"], row["intervals"]
    between = intervals.get("exact_match_difference")
    apart = None if between is None else f"{100 * (metrics['exact_match'] - original):+.2f} {_points(between)}"
    spread = None if intervals.get("kl_divergence") is None else "{:.2e} to {:.2e}".format(*intervals["kl_divergence"])
    values = (metrics["kl_divergence"], spread, metrics["top1_agreement"], metrics["exact_match"])
    return [name, bits, round(row["bytes"] / 1e6, 2), *values, apart, seconds]


def _points(interval: list[float]) -> str:
    return f"[{100 * interval[0]:+.2f}, {100 * interval[1]:+.2f}]"


def main() -> None:
    """Search, quantise, judge, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--problems", type=int, default=2000)
    parser.add_argument("--scratch", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = options.scratch or Path(name)
        scratch.mkdir(parents=True, exist_ok=True)
        load = os.getloadavg()[0]
        searching, agreement = searches(scratch)
        seconds = {
            model: dsc(scratch, folder(model), "quantize", MODEL, *(word.format(scratch=scratch) for word in words))
            for model, words in MODELS.items()
        }
        rows = judged(scratch, options.problems)
        exact = rows["original"]["metrics"]["exact_match"]
        table = [line(model, row, scratch, seconds.get(model), exact) for model, row in rows.items()]
    by_name = {row[0]: dict(zip(COLUMNS, row, strict=True)) for row in table}
    mixed, three = by_name["mixed, losses measured"], by_name["uniform 3 bits, groups of 32"]
    four = abs(rows["uniform 4 bits"]["metrics"]["exact_match"] - exact)
    bars = {
        "mixed at most 3.5 bits and below uniform 3 bits": mixed["bits per weight"] <= 3.5
        and mixed["KL"] < three["KL"],
        "4 bits within 1 point": options.problems >= 2000 and four <= POINTS,
    }
    facts = {
        "passed": all(bars.values()),
        "bars": bars,
        "problems": options.problems,
        "KL over": f"{WINDOWS} windows of {LENGTH} tokens of the test split",
        "CPU s of a search": searching,
        **agreement,
        "load_before": round(load, 2),
    }
    present("mixed_precision", COLUMNS, table, facts)


if __name__ == "__main__":
    main()

"""Does every recipe go to every target? An export succeeds, or is refused before anything is computed, with a fix.

    python -m benchmarks.targets_table [--model DIR] [--recipes NAME ...] [--targets NAME ...] [--samples N] [--keep]

Without `--model`: the built-in model and the tiny V2, Qwen2 and Llama of the tests. A cell is `yes` with what the check
found, or `refused` with the reason; anything else is a failure, and the exit code 1. Calibration is short: whether it
works is asked here, not how well. `--keep`: cells of the report that are not asked again stay.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.common import REPORTS, present
from deepseek_compress import pipeline, resources
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.export import TARGETS
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.recipe import Changes, read_recipe
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.export import Export
from tests import conftest

RECIPES = ("none", "w4a16-fast", "w4a16", "w4a16-best", "w4a8", "w8a8", "w8a8-static", "sparse24", "sparse24-w4a16")
TINY = {
    "tiny V2": (conftest.V2_CONFIG, 2),
    "tiny Qwen2": (conftest.QWEN2_CONFIG, 3),
    "tiny Llama": (conftest.LLAMA_CONFIG, 4),
}
COLUMNS = ["model", "recipe", "target", "outcome", "seconds", "what"]
FAILED = "FAILED"


def models(chosen: Path | None, scratch: Path) -> Iterator[tuple[str, Path]]:
    """Name and directory of each model."""
    if chosen is not None:
        yield chosen.name, chosen
        return
    yield "nano", resolve_model("builtin:nano")
    for name, (config, seed) in TINY.items():
        out = scratch / name.replace(" ", "-")
        out.mkdir()
        conftest.write_shards(out, conftest.published_state(config, seed), shards=1)
        yield name, conftest.finish_directory(out, config)


def compressed(model: Path, recipe: str, out: Path, samples: int, length: int) -> Path:
    """The checkpoint that `recipe` makes of `model`."""
    if recipe == "none":
        return model
    values: dict[str, Any] = {"model": str(model), "calibration.samples": samples, "calibration.length": length}
    wanted = read_recipe(resources.recipe_path(recipe), Changes((), values))
    pipeline.run(wanted, out, flat=True)
    return out


def outcome(source: Path, target: str, out: Path) -> tuple[str, str]:
    """(yes | refused | FAILED, what was said)."""
    stage, checkpoint = Export.model_validate({"target": target}), open_checkpoint(source)
    problems = stage.problems(checkpoint.header)
    if problems:
        return "refused", str(problems[0]) if problems[0].fix else FAILED
    told: list[str] = []
    context = Context("export", out, "", 0, tell=told.append, calibration={"sources": ["builtin"]})
    try:
        made = stage.run(checkpoint, context)
    except DscError as error:
        computed = any(out.rglob("*")) if out.exists() else False
        before = error.fix and not computed and "differs from the runtime" not in error.what
        return ("refused" if before else FAILED), str(error)
    found = made.facts.get("verification")
    return "yes", told[0] if found and told else str(made.facts.get("status"))


def main() -> None:
    """Compress, export, tell."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--only", nargs="*", help="names of the models, instead of all")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    rows: list[list[Any]] = []
    try:
        ask(options, rows)
    finally:
        report("targets_table" if options.model is None else f"targets_{options.model.name}", rows, options)
    if any(row[3] == FAILED for row in rows):
        raise SystemExit(1)


def report(name: str, rows: list[list[Any]], options: argparse.Namespace) -> None:
    """Write what was asked, with the cells of before that stay."""
    file = REPORTS / f"{name}.json"
    before = json.loads(file.read_text())["rows"] if options.keep and file.is_file() else []
    asked = {tuple(row[:3]) for row in rows}
    every = [*(row for row in before if tuple(row[:3]) not in asked), *rows]
    places = {value: place for place, value in enumerate([*RECIPES, *TARGETS, *dict.fromkeys(row[0] for row in every)])}
    every.sort(key=lambda row: [places.get(value, len(places)) for value in row[:3]])
    counts = {kind: sum(row[3] == kind for row in every) for kind in ("yes", "refused", FAILED)}
    present(name, COLUMNS, every, {"samples": options.samples, "length": options.length, "cells": counts})


def ask(options: argparse.Namespace, rows: list[list[Any]]) -> None:
    """Compress and export; a row a cell."""
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name, model in models(options.model, scratch):
            for recipe in options.recipes if not options.only or name in options.only else ():
                source = compressed(model, recipe, scratch / "packed", options.samples, options.length)
                for target in options.targets:
                    began = time.perf_counter()
                    try:
                        said = outcome(source, target, scratch / "out")
                    except Exception as error:
                        said = FAILED, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    taken, text = round(time.perf_counter() - began, 1), said[1].replace(str(source), name)
                    rows.append([name, recipe, target, said[0], taken, text])
                    shutil.rmtree(scratch / "out", ignore_errors=True)
                    print(*rows[-1], sep=" | ", file=sys.stderr, flush=True)
                shutil.rmtree(scratch / "packed", ignore_errors=True)


if __name__ == "__main__":
    main()

"""Options that make a command quick on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

TEXT = ("--samples", "2", "--length", "16")
MEASURE = ("--set", "evaluate.problems=2", "--set", "evaluate.efficiency=false")
DISTILL = ("--set", "distill.steps=1", "--set", "distill.documents=8", "--set", "distill.experts=6")


def shorten(words: Sequence[str], model: Path, text: Path) -> list[str]:
    """What to add to `dsc WORDS` so that it takes a second or two."""
    calibration = [*TEXT, "--calibration", str(text)]
    command, recipe = words[0], words[1]
    if command in {"prune", "calibrate"}:
        return calibration
    if command == "quantize":
        return [*calibration, "--group-size", "32"]
    if command == "distill":
        return [*calibration, *DISTILL]
    if command == "evaluate":
        return list(MEASURE)
    if command == "plan":
        return [*calibration, "--group-size", "32"]
    if command == "run":
        extra = [*DISTILL, *MEASURE] if recipe == "quickstart" else []
        return ["--model", str(model), *calibration, "--group-size", "32", *extra]
    return []

"""Options that make a command quick on a tiny model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

TEXT = ("--samples", "2", "--length", "16")
MEASURE = ("--set", "evaluate.problems=2", "--set", "evaluate.efficiency=false")
TRAIN = {"steps": 1, "documents": 8, "length": 64}


def shorten(words: Sequence[str], model: Path, text: Path) -> list[str]:
    """What to add to `dsc WORDS` so that it takes a second or two."""
    calibration = [*TEXT, "--calibration", str(text)]
    command = words[0]
    recipe = words[words.index("-r") + 1] if "-r" in words else "".join(words[1:2])
    if recipe == "quickstart":
        extra = [
            *_train("student"),
            *_train("student-sparse24"),
            "--set",
            "student.experts=8",
            "--set",
            "engine.compute_capabilities=[sm89]",
            *MEASURE,
        ]
        run = ["--model", str(model)] if command == "run" else []
        return [*run, *calibration, "--group-size", "32", *extra]
    if command == "run":
        return ["--model", str(model), *calibration, "--group-size", "32"]
    if command in {"prune", "calibrate"}:
        return calibration
    if "--statistics" in words:
        return ["--group-size", "32"]
    if command in {"plan", "quantize"}:
        return [*calibration, "--group-size", "32"]
    if command == "distill":
        timed = {"--tokens", "--minutes", "--steps"} & set(words)
        train = _train("distill")[2:] if timed else _train("distill")  # without steps
        return ["--calibration", str(text), *train, "--set", "experts=8"]
    if command == "allocate":
        options = "options=[{num_bits: 2}, {num_bits: 4}]"
        return [*calibration, "--group-size", "32", "--set", "windows=1", "--set", options]
    if command == "evaluate":
        return list(MEASURE)
    return []


def _train(stage: str) -> list[str]:
    return [word for key, value in TRAIN.items() for word in ("--set", f"{stage}.{key}={value}")]

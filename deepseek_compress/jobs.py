"""Turn what a user asks for into a validated recipe and the options of a run, for the command line and Python alike."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deepseek_compress import resources
from deepseek_compress.errors import DscError
from deepseek_compress.recipe import Changes, Recipe
from deepseek_compress.recipe import read_recipe as read

if TYPE_CHECKING:
    from deepseek_compress.pipeline import Options

FIRST = "quickstart"  # the recipe that a newcomer runs first
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


class Text(NamedTuple):
    """Calibration text as it was asked for; None leaves the recipe's own value."""

    sources: Sequence[str | Mapping[str, Any]] | None = None
    statistics: str | None = None  # directory of `dsc calibrate`, instead of text
    samples: int | None = None
    length: int | None = None  # tokens in a sample
    seed: int | None = None

    def values(self) -> dict[str, Any]:
        """Path in a recipe -> value."""
        values = {"sources": self.sources or None, "samples": self.samples, "length": self.length}
        if self.statistics is None:
            return {**{f"calibration.{key}": value for key, value in values.items()}, "seed": self.seed}
        given = {key: value for key, value in values.items() if value is not None}
        return {"calibration": {"statistics": self.statistics, **given}, "seed": self.seed}  # the recipe's text: unused


def read_recipe(
    name: str,
    model: str | None = None,
    settings: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    group_size: int | None = None,
    kind: str | None = None,
) -> Recipe:
    """Read the recipe file `name`, or the one of that name that comes with the package, changed as asked.

    `settings` are `path=value`; `values` maps a path to a value. With `kind`, it must have that one stage. Raises
    `DscError`.
    """
    changes = Changes(settings, {**(values or {}), "model": model}, group_size)
    wanted = read(resources.recipe_path(name), changes)
    kinds = [step.kind for step in wanted.steps]
    if kind and kinds != [kind]:
        raise DscError(f"{name}: has the stages {', '.join(kinds)}, not one {kind}", f"use dsc run {name}")
    return wanted


def distillation(teacher: str, student: str | None, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the model that the recipe starts from, and its values: a student of the user's is trained at its own
    size."""
    found = dict(values)
    cache = found.get("distill.cache")
    if student is None:
        return teacher, found
    found["distill.keep"] = 1.0
    if cache is None or not (Path(cache) / "teacher.json").is_file():  # else the teacher need not be there
        found |= {"distill.teacher": "teacher", "inputs": {"teacher": teacher}}
    return student, found


def evaluation(
    models: Sequence[str], reference: str | None, tasks: Sequence[str], values: Mapping[str, Any]
) -> tuple[str, dict[str, Any]]:
    """Return the checkpoint that an evaluation starts from, and its values: names, reference and deployed files."""
    from deepseek_compress.evaluation.subjects import subjects

    found = subjects(models, reference)
    return found.model, {
        "as": found.main,
        "inputs": found.inputs or None,
        "evaluate.models": found.names,
        "evaluate.reference": found.reference,
        "evaluate.deployed": found.deployed or None,
        "evaluate.suite": tasks[0] if len(tasks) == 1 else list(tasks) or None,
        **values,
    }


def options(
    device: str = "auto",
    memory: str | int | None = None,
    workers: int | None = None,
    ray: str | None = None,
    gpu_memory: str | int | None = None,
    quick: bool = False,
    verifier: str | None = None,
    guard: str | None = None,
) -> Options:
    """Validate what a run may use; sizes are bytes, or `8GiB`. Raises `DscError`."""
    from deepseek_compress.pipeline import Options
    from deepseek_compress.planning.device import choose_all

    if workers is not None and ray is not None:
        raise DscError("--workers and --ray together: the cluster says how many there are", "give one of them")
    chosen = ("cpu",) if ray is not None and device == "auto" else choose_all(device)
    several = chosen if len(chosen) > 1 else ()
    if ray is not None and several:
        raise DscError(f"--ray and --device {device} together: each task has a GPU of the cluster", "use --device cuda")
    if workers is not None and several:
        raise DscError(f"--workers and --device {device} together: each GPU has one", "leave --workers out")
    on_device = bytes_of(gpu_memory, "--gpu-memory")
    limits = (bytes_of(memory), workers, ray, on_device)
    return Options(chosen[0], *limits, quick=quick, verifier=verifier, filter=guard, several=several)


def measure_once(recipe: Recipe, device: str) -> None:
    """Measure this machine with the built-in run, if it was not: from then on `dsc plan` knows times."""
    from deepseek_compress.planning.rates import rates

    if recipe.name == FIRST and rates(device=device) is None:
        rates(measure=True, device=device)


def bytes_of(size: str | int | None, option: str = "--memory") -> int | None:
    """`8GiB`, `500MB` or a plain number -> bytes."""
    if size is None:
        return None
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([kmgt]i?)?b?\s*", str(size).lower())
    if not found or not float(found[1]):
        raise DscError(f"{option}: invalid size {size!r}", f"write for instance {option} 8GiB")
    return int(float(found[1]) * _UNITS[found[2] or ""])


def source_of(text: str) -> str | dict[str, Any]:
    """`a.jsonl` or `a.jsonl=0.7` -> a calibration source of a recipe. A path that exists is never cut."""
    path, equals, share = text.rpartition("=")
    if not equals or Path(text).exists():
        return text
    try:
        return {"path": path, "share": float(share)}
    except ValueError:
        raise DscError(f"--calibration {text!r}: invalid share {share!r}", "write for instance a.jsonl=0.7") from None

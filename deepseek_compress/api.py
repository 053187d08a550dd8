"""The Python face of `dsc`: what each command does, as one function. The same recipes, stages and errors.

    import deepseek_compress as dsc

    dsc.quantize("DIR", "OUT", group_size=64, calibration="chat.jsonl")
    print(dsc.load("OUT").generate("3 + 4 ="))
    report = dsc.evaluate("OUT", reference="DIR", out="report.json")

Every function raises `DscError`, whose message says what is wrong and how to fix it. A function that was interrupted
resumes when it is called again with the same arguments. `knobs` changes values of the recipe by their path, as `--set`
does: `{"weights.gptaq.num_bits": 3}`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

from deepseek_compress import console, jobs
from deepseek_compress.errors import DscError
from deepseek_compress.generation.loaded import Loaded
from deepseek_compress.pipeline import Plan
from deepseek_compress.recipe import Recipe

__all__ = [
    "DscError", "Loaded", "Machine", "Plan", "Recipe", "Training", "Work",
    "compare", "distill", "evaluate", "export", "load", "plan", "prune", "quantize", "read_recipe", "run",
]  # fmt: skip

Paths = str | Path | Sequence[str | Path]
Knobs = Mapping[str, Any]  # path in the recipe -> value


class Machine(TypedDict, total=False):
    """Limits of a run, as the command line's options."""

    device: str  # "auto", "cpu", "cuda", "cuda:N"
    memory: str | int  # of all processes together, "8GiB" or bytes
    gpu_memory: str | int
    workers: int  # processes that compute
    ray: str  # address of a cluster that computes instead
    quick: bool  # do not read large files again to verify them
    progress: bool  # show it on standard error


class Training(Machine, total=False):
    """Machine and text of a training; what is left out is the recipe's."""

    calibration: Paths | Mapping[str, float]  # files or directories; or file -> share of the tokens
    length: int  # tokens in a sample
    seed: int


class Work(Training, total=False):
    """Machine and text of a stage that compresses."""

    samples: int
    statistics: str | Path  # what `dsc calibrate` saved, instead of text
    group_size: int  # weights that share a scale


def load(target: str | Path, *, device: str = "auto", threads: int = 0, quick: bool = False) -> Loaded:
    """Open something that answers: a checkpoint, an export, a GGUF file, an engine, or a server's address."""
    from deepseek_compress.generation.targets import open_target
    from deepseek_compress.planning.device import choose

    return Loaded(open_target(str(target), threads, choose(device), quick))


def read_recipe(
    name: str | Path, *, model: str | Path | None = None, knobs: Knobs | None = None, **text: Unpack[Work]
) -> Recipe:
    """Read a recipe: a file, or the name of one that comes with the package (`"w4a16"`). Validated, and changed."""
    return _recipe(name, model, knobs, text, {}, None)


def plan(recipe: Recipe, **machine: Unpack[Machine]) -> Plan:
    """Forecast what a recipe would do, from shapes alone: bytes, memory, and every problem at once."""
    from deepseek_compress import pipeline

    return pipeline.plan(recipe, _options(machine))


def run(recipe: Recipe, out: str | Path, **machine: Unpack[Machine]) -> dict[str, Path]:
    """Run every stage of a recipe; returns the path of each output by the stage's name."""
    return _run(recipe, Path(out), machine, flat=False)


def quantize(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path = "w4a16",
    knobs: Knobs | None = None,
    **work: Unpack[Work],
) -> Path:
    """Quantize the weights of `model` into the checkpoint `out`; returns `out`."""
    return _one(_recipe(recipe, model, knobs, work, {}, "compress"), out, work)


def prune(
    model: str | Path,
    out: str | Path,
    *,
    recipe: str | Path = "sparse24",
    knobs: Knobs | None = None,
    **work: Unpack[Work],
) -> Path:
    """Make two of every four weights of `model` zero, in the checkpoint `out`; returns `out`."""
    return _one(_recipe(recipe, model, knobs, work, {}, "compress"), out, work)


def distill(
    teacher: str | Path,
    out: str | Path,
    *,
    student: str | Path | None = None,
    cache: str | Path | None = None,
    steps: int | None = None,
    tokens: int | None = None,
    minutes: float | None = None,
    recipe: str | Path = "distill",
    knobs: Knobs | None = None,
    **work: Unpack[Training],
) -> Path:
    """Train a smaller student from `teacher`, or `student` itself where it is given; returns `out`."""
    values = {
        "distill.cache": None if cache is None else str(cache),
        "distill.length": work.pop("length", None),
        "distill.steps": steps,
        "distill.tokens": tokens,
        "distill.minutes": minutes,
    }
    model, values = jobs.distillation(str(teacher), None if student is None else str(student), values)
    return _one(_recipe(recipe, model, knobs, work, values, "distill"), out, work)


def export(
    model: str | Path,
    out: str | Path,
    *,
    target: str | None = None,
    recipe: str | Path = "export",
    knobs: Knobs | None = None,
    **machine: Unpack[Machine],
) -> Path:
    """Write `model` in the form `target` (`dsc list` names them) below `out`; returns `out`."""
    return _one(_recipe(recipe, model, knobs, {}, {"export.target": target}, "export"), out, machine)


def evaluate(
    models: Paths,
    out: str | Path,
    *,
    reference: str | Path | None = None,
    tasks: Paths = (),
    text: str | Path | None = None,
    windows: int | None = None,
    length: int | None = None,
    problems: int | None = None,
    seed: int | None = None,
    recipe: str | Path = "evaluate",
    knobs: Knobs | None = None,
    **machine: Unpack[Machine],
) -> dict[str, Any]:
    """Measure models, exports and servers against a reference; writes `out` (.json, .md, .html), returns the record."""
    from deepseek_compress import pipeline

    values = {
        "evaluate.text": None if text is None else str(text),
        "evaluate.windows": windows,
        "evaluate.length": length,
        "evaluate.problems": problems,
        "seed": seed,
    }
    named = None if reference is None else str(reference)
    model, values = jobs.evaluation(_each(models), named, _each(tasks), values)
    wanted = _recipe(recipe, model, knobs, {}, values, "evaluate")
    with console.progress(quiet=not machine.get("progress", False)) as shown:
        page = pipeline.run_report(wanted, Path(out), _options(machine), shown)
    record: dict[str, Any] = json.loads(page.read_text(encoding="utf-8"))
    return record


def compare(reports: Paths, out: str | Path | None = None) -> dict[str, Any]:
    """Put reports side by side; writes `out` (.html or .csv) where it is given, returns the record of all models."""
    from deepseek_compress import reports as library

    return library.compare([Path(report) for report in _each(reports)], None if out is None else Path(out))


def _recipe(
    name: str | Path,
    model: str | Path | None,
    knobs: Knobs | None,
    work: Mapping[str, Any],
    values: Mapping[str, Any],
    kind: str | None,
) -> Recipe:
    statistics = work.get("statistics")
    text = jobs.Text(
        _sources(work.get("calibration")),
        None if statistics is None else str(statistics),
        *(work.get(key) for key in ("samples", "length", "seed")),
    )
    given = {key: value for key, value in text.values().items() if value is not None}
    settings = [f"{path}={json.dumps(value, default=str)}" for path, value in (knobs or {}).items()]
    named = None if model is None else str(model)
    return jobs.read_recipe(str(name), named, settings, {**given, **values}, work.get("group_size"), kind)


def _sources(given: Paths | Mapping[str, float] | None) -> list[str | Mapping[str, Any]] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        return [{"path": str(path), "share": share} for path, share in given.items()]
    return [*_each(given)]


def _each(given: Paths) -> list[str]:
    return [str(given)] if isinstance(given, (str, Path)) else [str(one) for one in given]


def _options(machine: Mapping[str, Any]) -> Any:
    keys = ("device", "memory", "workers", "ray", "gpu_memory", "quick")
    return jobs.options(**{key: machine[key] for key in keys if key in machine})


def _one(recipe: Recipe, out: str | Path, machine: Mapping[str, Any]) -> Path:
    _run(recipe, Path(out), machine, flat=True)
    return Path(out)


def _run(recipe: Recipe, out: Path, machine: Mapping[str, Any], flat: bool) -> dict[str, Path]:
    from deepseek_compress import pipeline

    with console.progress(quiet=not machine.get("progress", False)) as shown:
        return pipeline.run(recipe, out, _options(machine), shown, flat)

"""The commands that plan and do work: a recipe is read, changed by options, and given to the pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepseek_compress import console, jobs, machine
from deepseek_compress.cli import options as o
from deepseek_compress.cli import show
from deepseek_compress.export import TARGETS
from deepseek_compress.recipe import Recipe

if TYPE_CHECKING:
    from deepseek_compress.pipeline import Options

Target = Annotated[
    str | None,
    typer.Option("--target", help=f"{', '.join(TARGETS)}."),
]


def plan(
    context: typer.Context,
    model: o.Model,
    recipe: o.RecipeOption = "w4a16",
    settings: o.Settings = None,
    calibration: o.Calibration = None,
    statistics: o.Statistics = None,
    samples: o.Samples = None,
    length: o.Length = None,
    group_size: o.GroupSize = None,
    seed: o.Seed = None,
    device: o.Device = "auto",
    memory: o.Memory = None,
    gpu_memory: o.GpuMemory = None,
    workers: o.Workers = None,
    ray: o.Ray = None,
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine first (10 s); kept.")] = False,
    json: o.Json = False,
) -> None:
    """Show what a recipe would do to a model: stages, tensors, bytes, time, and every problem at once."""
    wanted = jobs.read_recipe(
        recipe, model, settings or (), _text(calibration, statistics, samples, length, seed), group_size
    )
    from deepseek_compress import pipeline
    from deepseek_compress.planning.rates import rates

    found = pipeline.plan(wanted, jobs.options(device, memory, workers, ray, gpu_memory))
    given = o.typed(context, "recipe", "measure", "json")
    show.plan(
        found, rates(measure, found.options.device), json, f"dsc run {quote(recipe)} --model {quote(model)}{given}"
    )
    if measure and not json and (busy := machine.busy()):
        console.note(busy)
    if found.problems:
        raise typer.Exit(1)


def run(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe file, or a name of `dsc list`.")],
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help="Instead of the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", metavar="OUT", help="[default: runs/RECIPE]")] = None,
    settings: o.Settings = None,
    calibration: o.Calibration = None,
    statistics: o.Statistics = None,
    samples: o.Samples = None,
    length: o.Length = None,
    group_size: o.GroupSize = None,
    seed: o.Seed = None,
    device: o.Device = "auto",
    memory: o.Memory = None,
    gpu_memory: o.GpuMemory = None,
    workers: o.Workers = None,
    ray: o.Ray = None,
    verifier: o.Verifier = None,
    quick: o.Quick = False,
    json: o.Json = False,
) -> None:
    """Run every stage of a recipe; the same command resumes a stopped run."""
    wanted = jobs.read_recipe(
        recipe, model, settings or (), _text(calibration, statistics, samples, length, seed), group_size
    )
    target = out or Path("runs") / wanted.name
    given = jobs.options(device, memory, workers, ray, gpu_memory, quick, verifier)
    jobs.measure_once(wanted, given.device)
    paths = _pipeline(wanted, target, given, json, flat=False)
    show.outputs(target, paths, wanted, json)


def _compressing(kind: str, default: str, summary: str) -> Callable[..., None]:
    """Return a command for the one stage `kind`; `default` names its recipe."""

    def command(
        model: o.Model,
        out: o.Out,
        recipe: o.RecipeOption = default,
        settings: o.Settings = None,
        calibration: o.Calibration = None,
        statistics: o.Statistics = None,
        samples: o.Samples = None,
        length: o.Length = None,
        group_size: o.GroupSize = None,
        seed: o.Seed = None,
        device: o.Device = "auto",
        memory: o.Memory = None,
        gpu_memory: o.GpuMemory = None,
        workers: o.Workers = None,
        ray: o.Ray = None,
        quick: o.Quick = False,
        json: o.Json = False,
    ) -> None:
        text = _text(calibration, statistics, samples, length, seed)
        wanted = jobs.read_recipe(recipe, model, settings or (), text, group_size, kind=kind)
        _one_stage(wanted, out, jobs.options(device, memory, workers, ray, gpu_memory, quick), json, model)

    command.__doc__ = summary
    return command


def distill(
    teacher: o.Model,
    out: o.Out,
    student: Annotated[
        str | None, typer.Option("--student", metavar="DIR", help="To train. [default: TEACHER, made smaller]")
    ] = None,
    cache: Annotated[
        str | None, typer.Option("--cache", metavar="DIR", help="What the teacher says, recorded there once.")
    ] = None,
    calibration: o.TrainingText = None,
    steps: Annotated[int | None, typer.Option("--steps", min=0, help="Train so many steps.")] = None,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Train on so many tokens.")] = None,
    minutes: Annotated[float | None, typer.Option("--minutes", min=0.01, help="Train about as long.")] = None,
    length: Annotated[int | None, typer.Option("--length", min=2, metavar="TOKENS", help="Cut texts to it.")] = None,
    recipe: o.RecipeOption = "distill",
    settings: o.Settings = None,
    seed: o.Seed = None,
    device: o.Device = "auto",
    memory: o.Memory = None,
    json: o.Json = False,
) -> None:
    """Train a smaller student from a teacher."""
    values: dict[str, Any] = {
        **_text(calibration, None, None, None, seed),
        "distill.cache": cache,
        "distill.length": length,
        "distill.steps": steps,
        "distill.tokens": tokens,
        "distill.minutes": minutes,
    }
    model, values = jobs.distillation(teacher, student, values)
    wanted = jobs.read_recipe(recipe, model, settings or (), values, kind="distill")
    _one_stage(wanted, out, jobs.options(device, memory), json, teacher)


prune = _compressing("compress", "sparse24", "Make two of every four weights zero.")
calibrate = _compressing(
    "calibrate",
    "calibrate",
    "Save what each linear sees of calibration text, for --statistics; show ranges and tokens an expert gets.",
)
quantize = _compressing("compress", "w4a16", "Quantize weights (default recipe: w4a16).")


def allocate(
    model: o.Model,
    out: o.Out,
    target: Annotated[
        str | None, typer.Option("--target", metavar="SIZE", help="'3.5 bits per weight', or 8GiB of all files.")
    ] = None,
    recipe: o.RecipeOption = "mixed",
    settings: o.Settings = None,
    calibration: o.Calibration = None,
    samples: o.Samples = None,
    length: o.Length = None,
    group_size: o.GroupSize = None,
    seed: o.Seed = None,
    device: o.Device = "auto",
    memory: o.Memory = None,
    gpu_memory: o.GpuMemory = None,
    workers: o.Workers = None,
    ray: o.Ray = None,
    quick: o.Quick = False,
    json: o.Json = False,
) -> None:
    """Find by measurement which bits each part of a model needs under a size; writes a recipe for quantize."""
    values = {**_text(calibration, None, samples, length, seed), "allocate.target": target}
    wanted = jobs.read_recipe(recipe, model, settings or (), values, group_size, kind="allocate")
    _one_stage(wanted, out, jobs.options(device, memory, workers, ray, gpu_memory, quick), json, model)


def export(
    model: o.Model,
    out: o.Out,
    target: Target = None,
    recipe: o.RecipeOption = "export",
    settings: o.Settings = None,
    device: o.Device = "auto",
    memory: o.Memory = None,
    workers: o.Workers = None,
    quick: o.Quick = False,
    json: o.Json = False,
) -> None:
    """Write a checkpoint in a form that others run."""
    wanted = jobs.read_recipe(recipe, model, settings or (), {"export.target": target}, kind="export")
    _one_stage(wanted, out, jobs.options(device, memory, workers, quick=quick), json, model)


def evaluate(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL...", help="Checkpoints, builtin:nano, outputs of export, http://HOST.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="REPORT.json", help="The report; .md and .html too.")],
    reference: Annotated[str | None, typer.Option("--reference", metavar="MODEL", help="To compare with.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option("--tasks", metavar="FILE", help="builtin, or .jsonl/.parquet questions.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="FILE", help="Text for perplexity and KL.")] = None,
    windows: Annotated[int | None, typer.Option("--windows", min=1, help="Windows of the text.")] = None,
    length: Annotated[int | None, typer.Option("--length", min=2, metavar="TOKENS", help="Tokens a window.")] = None,
    problems: Annotated[int | None, typer.Option("--problems", min=0, help="Reasoning problems.")] = None,
    until: Annotated[
        float | None, typer.Option("--until", metavar="POINTS", help="Ask until such a difference is settled.")
    ] = None,
    kv_cache: Annotated[
        int | None, typer.Option("--kv-cache", metavar="BITS", help="Keep MODEL's keys and values in 8 or 4 bits.")
    ] = None,
    guard: Annotated[
        str | None, typer.Option("--filter", metavar="FILE.py:NAME", help="Code of yours that blocks answers.")
    ] = None,
    recipe: o.RecipeOption = "evaluate",
    settings: o.Settings = None,
    seed: o.Seed = None,
    device: o.Device = "auto",
    memory: o.Memory = None,
    gpu_memory: o.GpuMemory = None,
    workers: o.Workers = None,
    quick: o.Quick = False,
    json: o.Json = False,
) -> None:
    """Measure what a model can still do, against a reference."""
    values = {
        "evaluate.text": text,
        "evaluate.windows": windows,
        "evaluate.length": length,
        "evaluate.problems": problems,
        "evaluate.until": until,
        "evaluate.kv_cache": None if kv_cache is None else {"num_bits": kv_cache},
        "seed": seed,
    }
    model, values = jobs.evaluation(models, reference, tasks or (), values)
    wanted = jobs.read_recipe(recipe, model, settings or (), values, kind="evaluate")
    from deepseek_compress import pipeline

    with console.progress(quiet=json) as progress:
        given = jobs.options(device, memory, workers, None, gpu_memory, quick, guard=guard)
        page = pipeline.run_report(wanted, out, given, progress)
    show.report(page, page.with_suffix(".html"), json)


def _text(
    sources: list[str] | None, statistics: str | None, samples: int | None, length: int | None, seed: int | None
) -> dict[str, Any]:
    given = [jobs.source_of(source) for source in sources or ()]
    return jobs.Text(given, statistics, samples, length, seed).values()


def _pipeline(wanted: Recipe, out: Path, options: Options, json: bool, flat: bool) -> dict[str, Path]:
    from deepseek_compress import pipeline

    with console.progress(quiet=json) as progress:
        return pipeline.run(wanted, out, options, progress, flat)


def _one_stage(wanted: Recipe, out: Path, options: Options, json: bool, model: str) -> None:
    _pipeline(wanted, out, options, json, flat=True)
    show.output(out, wanted, model, json)

"""Plan and run a recipe: a fold over its stages, each reading an earlier output and writing its own directory.

A stage that is finished is not repeated; an interrupted one is called again with the same directory and goes on from
what it left there. What an output directory is of (recipe, model, data, seed, versions) stands in it, and a run that
differs in any of them is refused with what differs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from deepseek_compress import machine, provenance, workspace
from deepseek_compress.calibration.settings import Select
from deepseek_compress.calibration.sources import files_of
from deepseek_compress.checkpoint import Checkpoint, Header, open_checkpoint, verified
from deepseek_compress.checkpoint.files import write_sealed
from deepseek_compress.checkpoint.owned import forget
from deepseek_compress.console import StageProgress, duration, size
from deepseek_compress.errors import DscError, Problems, raise_problems
from deepseek_compress.models import Architecture
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.planning import device
from deepseek_compress.planning.costs import Memory, Work, total
from deepseek_compress.recipe import Recipe, Step
from deepseek_compress.stages.base import Context, Forecast
from deepseek_compress.stages.identity import code_hash, lasting, manifest_hash, text_hashes
from deepseek_compress.stages.shortage import gpu_problems, memory_problems
from deepseek_compress.stages.text import choice_cost
from deepseek_compress.workers.address import cluster_problems

REPORTS = ("report.json", "report.md", "report.html")


@dataclass(frozen=True)
class Options:
    """Resources of a run; of these only the device may change bytes that are written."""

    device: str = "cpu"
    memory: int | None = None  # bytes, all processes together
    workers: int | None = None  # processes; None: as many as serve
    ray: str | None = None  # address of a cluster
    gpu_memory: int | None = None  # bytes of a GPU
    quick: bool = False  # do not read large files a second time to verify them
    verifier: str | None = None  # FILE.py:FUNCTION, code of the user's for the stage `traces`
    filter: str | None = None  # the same for `evaluate`
    several: tuple[str, ...] = ()  # GPUs that share the tasks, `device` first; empty where that computes alone

    @property
    def devices(self) -> tuple[str, ...]:
        """All that compute."""
        return self.several or (self.device,)

    @property
    def processes(self) -> int | None:
        """`workers`, as far as there are cores."""
        return None if self.workers is None else min(self.workers, machine.cores())

    def decisions(self) -> list[str]:
        """Say what limits the run, where that is less than was asked for."""
        if self.workers == self.processes:
            return []
        return [f"--workers {self.processes}, not {self.workers}: this machine has {machine.cores()} cores"]


@dataclass(frozen=True)
class Plan:
    """Result of planning. `forecasts` has a stage as far as the one before it could be foreseen."""

    recipe: Recipe
    model: Path | None
    header: Header | None
    forecasts: Mapping[str, Forecast]
    problems: list[DscError]
    options: Options = Options()

    @property
    def bytes(self) -> int | None:
        """On disk, all stages together; None when one of them cannot tell."""
        sizes = [forecast.bytes for forecast in self.forecasts.values()]
        known = [size for size in sizes if size is not None]
        return sum(known) if known and len(known) == len(self.recipe.steps) else None


@dataclass
class _Run:
    """State that the fold carries: where outputs are and what identifies them."""

    out: Path
    flat: bool
    recipe: Recipe
    options: Options
    progress: StageProgress
    versions: Mapping[str, str | None]
    paths: dict[str, Path] = field(default_factory=dict)
    prints: dict[str, str] = field(default_factory=dict)  # name -> what its bytes follow from

    def directory(self, name: str) -> Path:
        return self.out if self.flat else self.out / name


def plan(recipe: Recipe, options: Options = Options()) -> Plan:
    """Everything that would happen and every problem, from headers alone; writes nothing."""
    problems: list[DscError] = []
    paths: dict[str, Path] = {}
    headers: dict[str, Header] = {}
    for name, model in {"model": recipe.model, **recipe.inputs}.items():
        with _collect(problems):
            if model is None:
                raise DscError(f"{recipe.name}: no model", "name one: `model:` in the recipe, or --model")
            paths[name] = resolve_model(model)
            header = open_checkpoint(paths[name]).header
            raise_problems(Architecture.of(header).problems())
            headers[name] = header
    forecasts = _forecasts(recipe, headers["model"], problems) if "model" in headers else {}
    problems += _calibration_problems(recipe, paths.get("model"))
    problems += memory_problems(forecasts, options.memory)
    problems += gpu_problems(forecasts, options.devices, options.gpu_memory)
    problems += cluster_problems(options.ray)
    if options.verifier is not None and all(step.kind != "traces" for step in recipe.steps):
        problems.append(DscError(f"--verifier: {recipe.name} has no stage traces", "leave it out"))
    return Plan(recipe, paths.get("model"), headers.get("model"), forecasts, problems, options)


def run(
    recipe: Recipe, out: Path, options: Options = Options(), progress: StageProgress | None = None, flat: bool = False
) -> dict[str, Path]:
    """Run every stage that is not finished; returns the path of each output by name.

    Stage NAME writes to `out/NAME`; with `flat` the only stage writes to `out` itself. Raises `DscError`.
    """
    found = plan(recipe, options)
    raise_problems(found.problems)
    if flat and len(recipe.steps) != 1:
        raise DscError(f"{recipe.name}: has {len(recipe.steps)} stages", f"use dsc run {recipe.name}")
    workspace.check_ours(out)
    _check_disk(found, out, flat)
    with workspace.lock(out), machine.peak_memory() as peak:
        began = time.time()
        state = _Run(out, flat, recipe, options, progress or StageProgress(), provenance.versions())
        _inputs(state)
        workspace.agree(out, _identity(state), state.progress.tell)
        for line in options.decisions():
            state.progress.tell(line)
        if options.quick:
            state.progress.tell("--quick: of files above 1 MiB, sizes alone are compared with what was written")
        for each in options.devices if options.device != device.CPU else ():
            device.bound_memory(each, options.gpu_memory)
            state.progress.tell(device.describe(each))
        _pages(state, recipe.steps)
        for number, step in enumerate(recipe.steps, start=1):
            state.progress.start(step.name, number, len(recipe.steps))
            _stage(state, step)
        if not flat:
            _close(state)
            write_sealed(out / workspace.RUN, workspace.costs(began, peak[0], {}))
    return state.paths


def run_report(recipe: Recipe, page: Path, options: Options = Options(), progress: StageProgress | None = None) -> Path:
    """Run the one stage of `recipe`, which writes a report, and put the report at `page` (.json, with .md and .html).

    The stage's own directory is `page` with the suffix `.dsc`. A `page` without suffix is a directory for everything.
    """
    if page.suffix in (".md", ".html"):
        raise DscError(f"-o {page}: a page, not the report", f"name that: -o {page.with_suffix('.json')}")
    if page.suffix != ".json":
        run(recipe, page, options, progress, flat=True)
        return page / REPORTS[0]
    home = page.with_suffix(".dsc")
    pages = workspace.Pages(home, {name: page.with_suffix(Path(name).suffix) for name in REPORTS})
    run(recipe, home, options, progress, flat=True)
    pages.publish()
    return page


def _forecasts(recipe: Recipe, header: Header, problems: list[DscError]) -> dict[str, Forecast]:
    """Fold shapes through the stages; a stage after one that has problems is left out."""
    headers, forecasts = {"model": header}, {}
    wanted, select = recipe.calibration, recipe.calibration.select
    for step in recipe.steps:
        source = headers.get(step.source)
        if source is None:
            continue
        before = len(problems)
        with _collect(problems):
            problems += [_named(step, problem) for problem in step.stage.problems(source)]
        if len(problems) > before:
            continue
        with _collect(problems):
            saved = wanted.statistics is not None and step.stage.takes_statistics
            forecast = step.stage.forecast(source, 0 if saved else wanted.samples, wanted.length)
            if select is not None and not saved and step.stage.reads_text(source):
                forecast = _with_choice(forecast, source, select, wanted.length)
            forecasts[step.name] = forecast
            if step.stage.writes == "checkpoint":
                headers[step.name] = forecasts[step.name].header
    return forecasts


def _with_choice(forecast: Forecast, source: Header, select: Select, length: int) -> Forecast:
    """Add the costs of choosing the stage's text from a pool."""
    memory, work, tasks = choice_cost(source, select, length)
    return replace(
        forecast,
        memory=Memory(*map(max, memory, forecast.memory or memory)),
        work=total([work, forecast.work or Work()]),
        tasks=total([tasks, forecast.tasks or Work()]),
    )


def _named(step: Step, problem: DscError) -> DscError:
    line = f" (recipe line {step.line})" if step.line else ""
    return DscError(f"{step.name}{line}: {problem.what}", problem.fix)


def _calibration_problems(recipe: Recipe, model: Path | None) -> list[DscError]:
    problems: list[DscError] = []
    with _collect(problems):
        for step in recipe.steps:
            if model is not None and recipe.calibration.statistics is not None and step.source == "model":
                problems += step.stage.statistics_problems(open_checkpoint(model), recipe.calibration)
    for source in recipe.calibration.named:
        with _collect(problems):
            files_of(source.path)
    return [DscError(f"calibration: {problem.what}", problem.fix) for problem in problems]


@contextmanager
def _collect(problems: list[DscError]) -> Iterator[None]:
    """Add a `DscError` raised inside to `problems`."""
    try:
        yield
    except Problems as error:
        problems += error.problems
    except DscError as error:
        problems.append(error)


def _check_disk(found: Plan, out: Path, flat: bool) -> None:
    needed = sum(
        (forecast.bytes or 0) + forecast.scratch
        for name, forecast in found.forecasts.items()
        if not workspace.read((out if flat else out / name) / workspace.MANIFEST).get("pipeline")
    )
    free = machine.free_disk(out)
    if needed > free:
        raise DscError(f"{out}: {size(needed)} are needed, {size(free)} are free", "make room, or choose another -o")


def _inputs(state: _Run) -> None:
    """Path and fingerprint of each model that comes from outside."""
    recipe = state.recipe
    for name, model in {"model": recipe.model, **recipe.inputs}.items():
        state.paths[name] = resolve_model(str(model))
        verified.check(state.paths[name], state.options.quick)
        state.prints[name] = provenance.fingerprint(open_checkpoint(state.paths[name]))
    state.paths[recipe.alias] = state.paths["model"]
    state.prints[recipe.alias] = state.prints["model"]


def _identity(state: _Run) -> dict[str, Any]:
    """Collect everything that the bytes of the outputs depend on."""
    recipe = state.recipe
    return {
        "recipe": {
            key: value
            for key, value in lasting(recipe.document, recipe.steps).items()
            if key not in {"model", "inputs", "name"}
        },
        "inputs": {name: state.prints[name] for name in ("model", *recipe.inputs)},
        "calibration_data": {source.path: text_hashes(source.path) for source in recipe.calibration.named},
        "statistics": manifest_hash(recipe.calibration.statistics),
        "versions": state.versions,
        **code_hash(verifier=state.options.verifier, filter=state.options.filter),
    }


def _stage(state: _Run, step: Step) -> None:
    """Run one stage, or find it finished."""
    directory = state.directory(step.name)
    identity = _stage_identity(state, step)
    fingerprint = provenance.digest(identity)
    state.prints[step.name] = fingerprint
    entry = workspace.finished(directory, fingerprint, state.options.quick, state.progress.tell)
    if entry is not None:
        for name, hashes in {} if state.options.quick else entry["sources"].items():
            workspace.same_source(state.paths[name], hashes, directory)
        state.paths[step.name] = directory / entry["output"]
        state.progress.finish(step.name, "already finished")
    else:
        _run_stage(state, step, directory, fingerprint)
    workspace.Sources.end(state.out / workspace.HOUSE, step.name)
    forget(directory)
    for pages in _pages(state, [step]):
        pages.publish()


def _pages(state: _Run, steps: Sequence[Step]) -> list[workspace.Pages]:
    """Find reports of stages, to be copied to the directory of the whole run; foreign ones there are refused."""
    copies = {name: state.out / name for name in REPORTS}
    found = [step for step in steps if step.stage.writes == "report" and not state.flat]
    return [workspace.Pages(state.directory(step.name), copies, state.out) for step in found]


def _run_stage(state: _Run, step: Step, directory: Path, fingerprint: str) -> None:
    """Run one stage; its output counts once all it read is seen not to have changed."""
    directory.mkdir(parents=True, exist_ok=True)
    if _alone(state, step) and (state.options.several or state.options.ray is not None):
        state.progress.tell(f"{step.name}: on {state.options.device} alone, this stage shares no work among GPUs")
    began = time.time()
    read = dict.fromkeys([step.source, *(step.stage.reads() or (state.paths if step.stage.writes == "report" else ()))])
    paths = {name: state.paths[name] for name in read}
    texts = {f"text {source.name}": file for source in state.recipe.calibration.named for file in files_of(source.path)}
    sources = workspace.Sources(state.out / workspace.HOUSE, step.name, {**paths, **texts})
    sources.begin(directory, state.progress.tell)
    source = open_checkpoint(state.paths[step.source])
    with machine.peak_memory() as peak, device.careful(state.options.device, state.progress.tell):
        output = step.stage.run(source, _context(state, step, directory))
    sources.check(directory)
    write_sealed(directory / workspace.RUN, workspace.costs(began, peak[0], output.facts))
    state.paths[step.name] = output.path
    manifest = verified.manifest_of(directory) if step.stage.writes != "report" else None
    if manifest is None:
        manifest = _manifest(state, step, source)
        write_sealed(directory / workspace.MANIFEST, manifest)
    known = (manifest.get("source") or {}).get("files") or {}
    given = [name for name in read if name in ("model", *state.recipe.inputs)]
    hashes = {name: workspace.source_hashes(paths[name], known if name == step.source else {}) for name in given}
    place = {"kind": output.kind, "output": str(output.path.relative_to(directory))}
    workspace.finish(directory, {"fingerprint": fingerprint, **place, "sources": hashes})
    state.progress.finish(step.name, f"done in {duration(time.time() - began)}")


def _stage_identity(state: _Run, step: Step) -> dict[str, Any]:
    recipe = state.recipe
    names = dict.fromkeys([step.source, *step.stage.reads()])
    return {
        "name": step.name,
        "stage": step.kind,
        "knobs": step.knobs,
        "seed": recipe.seed,
        "calibration": recipe.calibration.document(),
        "inputs": {name: state.prints[name] for name in names},
        "versions": state.versions,
    }


def _manifest(state: _Run, step: Step, source: Checkpoint) -> dict[str, Any]:
    """For a stage that writes none of its own."""
    recipe = state.recipe
    return provenance.build_manifest(
        stage=step.kind, source=source, recipe=recipe.text, seed=recipe.seed, knobs=step.knobs, name=step.source
    )


def _alone(state: _Run, step: Step) -> bool:
    """Whether a stage computes on the first GPU alone."""
    return state.options.device != device.CPU and not step.stage.shares


def _context(state: _Run, step: Step, directory: Path) -> Context:
    recipe, options = state.recipe, state.options
    return Context(
        name=step.name,
        out=directory,
        recipe_text=recipe.text,
        seed=recipe.seed,
        calibration=recipe.calibration.document(),
        device=options.device,
        devices=options.several,
        memory=options.memory,
        workers=options.processes,
        ray=None if _alone(state, step) else options.ray,
        verifier=options.verifier,
        filter=options.filter,
        outputs=dict(state.paths),
        progress=state.progress.update,
        tell=state.progress.tell,
    )


def _close(state: _Run) -> None:
    """Write the manifest of the whole run."""
    recipe = state.recipe
    manifest = {"schema": provenance.SCHEMA, "recipe": recipe.text, "seed": recipe.seed, "versions": state.versions}
    manifest |= {
        "inputs": {name: state.prints[name] for name in ("model", *recipe.inputs)},
        "stages": {step.name: state.prints[step.name] for step in recipe.steps},
    }
    write_sealed(state.out / workspace.MANIFEST, manifest)

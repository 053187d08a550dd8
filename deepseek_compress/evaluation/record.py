"""Measure several checkpoints on the same problems and tokens and put it all into one run record (DESIGN: report JSON).

The reference comes first, because everything else is compared with it; then one model after another is loaded,
measured and forgotten. Keys of the record are stable and unknown values are None.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from deepseek_compress import machine, provenance
from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.checkpoint.verified import hash_of
from deepseek_compress.compress.summary import coverage
from deepseek_compress.errors import DscError, Problems, raise_problems
from deepseek_compress.evaluation import divergence, efficiency, reasoning, streamed, summary
from deepseek_compress.evaluation.about import about
from deepseek_compress.evaluation.divergence import Divergence, Sample, Trace
from deepseek_compress.evaluation.reasoning import Prompts
from deepseek_compress.evaluation.statistics import Bootstrap
from deepseek_compress.evaluation.streamed import NO_LIMITS, Limits, Subject
from deepseek_compress.models import Architecture
from deepseek_compress.models.cache import cache_bytes, cache_problems, kv_rounding
from deepseek_compress.models.resolve import name_of
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import Tokenizer, load_tokenizer
from deepseek_compress.numerics.kv_cache import KvRounding
from deepseek_compress.streaming.loop import Progress, silent
from deepseek_compress.tasks import Verdict

SCHEMA = 1
METRICS = (*summary.REASONING, *summary.FIDELITY, *efficiency.UNKNOWN)

OTHER_TOKENIZER = "{} has another tokenizer than the reference: perplexity and KL are unknown."
TEACHER_FORCED = "Run block by block over given text (teacher-forced): nothing was generated; no exact match, no speed."
SOLUTIONS = 400  # fidelity is a mean over tokens: these hold some 15,000, and each model predicts them all


@dataclass(frozen=True)
class Settings:
    """What is measured. `suite` None: no problems; `text` None: fidelity on the suite's reference solutions."""

    suite: str | None = "builtin"
    problems: int = 1000
    text: Path | None = None
    windows: int = 64
    length: int = 512
    efficiency: bool = True
    seed: int = 0  # of the resampling
    kv_cache: KvRounding | None = None  # of every model but the reference, instead of what its manifest says
    streamed: bool | None = None  # block by block; None: where a model does not fit into memory
    limits: Limits = NO_LIMITS


@dataclass(frozen=True)
class Task:
    """The same questions for every model: prompts, samples to predict, and the resampling of both."""

    prompts: Prompts | None
    samples: Sequence[Sample]
    problem_draws: Bootstrap | None
    sample_draws: Bootstrap | None


@dataclass
class _Run:
    settings: Settings
    tokenizer: Tokenizer  # of the reference, or of the first model
    task: Task
    notes: list[str]
    progress: Progress
    total: int
    streamed: Mapping[str, Divergence] | None = None  # of each model, where none is held in memory
    trace: Trace | None = None
    reference: Sequence[Verdict] | None = None
    done: int = 0

    def step(self, note: str, share: float = 0.0) -> None:
        """Tell how far it is: 100 parts a model."""
        self.progress(round(100 * (self.done + share)), 100 * self.total, note)


def evaluate(
    models: Mapping[str, Path],
    reference: str | None,
    settings: Settings = Settings(),
    ablations: Mapping[str, Path] | None = None,
    progress: Progress = silent,
    work: Path | None = None,
) -> dict[str, Any]:
    """The record of `models` (name -> directory, in the order of the pipeline) and of `ablations` beside them.

    `reference` is a name of `models`, or None: then nothing is compared. `work`: a directory from which an interrupted
    streamed evaluation goes on. Raises `Problems` before anything is computed.
    """
    everything = {**models, **(ablations or {})}
    if reference is not None and reference not in models:
        raise DscError(f"reference {reference!r} is not among the models", f"choose one of: {', '.join(models)}")
    checkpoints = _open(everything)
    raise_problems(_cache_problems(checkpoints, reference, settings.kv_cache))
    first = reference if reference is not None else next(iter(models))
    tokenizer = load_tokenizer(checkpoints[first].path)
    task = prepare(settings, tokenizer)
    notes = [] if settings.text is None else _seen_before(settings.text, checkpoints)
    run = _Run(settings, tokenizer, task, notes, progress, len(everything))
    rows: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory(prefix="dsc-evaluate-") as folder:
        if _is_streamed(settings, checkpoints):
            ordered = dict(sorted(checkpoints.items(), key=lambda item: item[0] != first))
            run.streamed = _streamed(run, ordered, reference, work or Path(folder))
        for name in sorted(everything, key=lambda name: name != first):  # the reference first; sorting is stable
            rows[name] = _row(run, name, checkpoints[name], Path(folder) if name == reference else None)
            run.done += 1
    run.step("done")
    return finish(run, rows, list(models), reference)


def prepare(settings: Settings, tokenizer: Tokenizer) -> Task:
    """Tokenise what every model is asked. Raises `DscError` for a text or suite that does not serve."""
    prompts = None
    if settings.suite is not None:
        prompts = reasoning.prepare(reasoning.load_suite(settings.suite, settings.problems), tokenizer)
    samples: Sequence[Sample] = prompts.solutions[:SOLUTIONS] if prompts else ()
    if settings.text is not None:
        samples = divergence.text_windows(settings.text, tokenizer, settings.windows, settings.length)
    return Task(
        prompts,
        samples,
        Bootstrap(len(prompts.problems), settings.seed) if prompts else None,
        Bootstrap(len(samples), settings.seed) if samples else None,
    )


def finish(
    run: _Run, rows: Mapping[str, dict[str, Any]], names: Sequence[str], reference: str | None
) -> dict[str, Any]:
    """The record, in the order of the schema."""
    record = {
        "schema": SCHEMA,
        "reference": reference,
        "models": [rows[name] for name in names],
        "artifacts": [],
        "machine": machine.describe(),
        "versions": dict(provenance.versions()),
        "ablations": [row for name, row in rows.items() if name not in names],
        "suite": _suite(run),
        "text": _text(run),
        "notes": run.notes,
    }
    found: dict[str, Any] = summary.finite(record)
    return found


def _open(models: Mapping[str, Path]) -> dict[str, Checkpoint]:
    problems: list[DscError] = []
    found: dict[str, Checkpoint] = {}
    for name, path in models.items():
        try:
            found[name] = open_checkpoint(path)
        except Problems as error:
            problems += error.problems
        except DscError as error:
            problems.append(error)
    raise_problems(problems)
    return found


def _cache_problems(
    checkpoints: Mapping[str, Checkpoint], reference: str | None, kv_cache: KvRounding | None
) -> Iterator[DscError]:
    """Models whose cache cannot be stored as asked for."""
    for name, checkpoint in checkpoints.items():
        if kv_cache is not None and name != reference:
            yield from cache_problems(Architecture.of(checkpoint).cfg, kv_cache)


def _seen_before(text: Path, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """A note on each model whose manifest says that it was calibrated on the file that judges it."""
    here, notes = hash_of(text), []
    for name, checkpoint in checkpoints.items():
        calibration = (checkpoint.manifest or {}).get("calibration") or {}
        if any(here in (source.get("files") or {}).values() for source in calibration.get("sources") or []):
            notes.append(f"{name} was calibrated on {text.name}: expect worse on text it never saw.")
    return notes


def _is_streamed(settings: Settings, checkpoints: Mapping[str, Checkpoint]) -> bool:
    if settings.streamed is not None:
        return settings.streamed
    return not all(streamed.fits(checkpoint.header, settings.limits.memory) for checkpoint in checkpoints.values())


def _streamed(
    run: _Run, checkpoints: Mapping[str, Checkpoint], reference: str | None, work: Path
) -> dict[str, Divergence]:
    """Perplexity and KL of every model with the tokenizer of the first, none of them in memory."""
    run.notes.append(TEACHER_FORCED)
    chosen = {}
    for name, checkpoint in checkpoints.items():
        if _same_tokenizer(run.tokenizer, checkpoint):
            chosen[name] = Subject(checkpoint, _rounding(run, name == reference, checkpoint))
        else:
            run.notes.append(OTHER_TOKENIZER.format(name))
    if not run.task.samples:
        return {}
    parts = 100 * run.total
    found = streamed.measure(
        chosen,
        run.task.samples,
        work,
        run.settings.limits,
        lambda done, of, note: run.progress(parts * done // of, parts, note),
    )
    alone = {name: Divergence(its.tokens, its.nll) for name, its in found.items()}
    return found if reference is not None else alone


def _rounding(run: _Run, is_reference: bool, checkpoint: Checkpoint) -> KvRounding | None:
    """How keys and values of a model are rounded."""
    return (None if is_reference else run.settings.kv_cache) or kv_rounding(checkpoint.kv_cache)


def _row(run: _Run, name: str, checkpoint: Checkpoint, folder: Path | None) -> dict[str, Any]:
    """Everything about one model. With a folder it is the reference, and its trace is kept there."""
    run.step(f"{name}: reading")
    row: dict[str, Any] = {"name": name, "path": name_of(checkpoint.path), **efficiency.sizes(checkpoint)}
    row |= {"metrics": dict.fromkeys(METRICS), "intervals": {}, "lineage": _lineage(checkpoint)}
    rounding = _rounding(run, folder is not None, checkpoint)
    row |= {"about": about(checkpoint, rounding), "relative": {}, "families": None, "error_by_layer": None}
    size = cache_bytes(Architecture.of(checkpoint).cfg, rounding)
    row["kv_cache_bytes_per_token"] = None if size is None else size.stored
    row["expert_coverage"] = coverage(checkpoint.path)
    if run.streamed is not None:
        _report(run, row, run.streamed.get(name), folder is not None)
        return row
    if run.task.prompts or run.task.samples:
        model = Model.load(checkpoint, kv_cache=rounding, device=run.settings.limits.device)
        _fidelity(run, row, model, checkpoint, folder)
        _reasoning(run, row, model, checkpoint, folder is not None)
        del model
        gc.collect()
    if run.settings.efficiency:
        run.step(f"{name}: speed and memory", 0.9)
        row["metrics"] |= efficiency.speed_and_memory(checkpoint.path, run.settings.limits.device)
    return row


def _fidelity(run: _Run, row: dict[str, Any], model: Model, checkpoint: Checkpoint, folder: Path | None) -> None:
    samples = run.task.samples
    if not samples:
        return
    run.step(f"{row['name']}: next-token distribution", 0.05)
    if folder is not None:
        run.trace, found = divergence.record(model, samples, folder)
    elif _same_tokenizer(run.tokenizer, checkpoint):
        found = divergence.measure(model, samples, run.trace)
    else:
        run.notes.append(OTHER_TOKENIZER.format(row["name"]))
        return
    _report(run, row, found, folder is not None)


def _report(run: _Run, row: dict[str, Any], found: Divergence | None, is_reference: bool) -> None:
    """Put what was measured into the row."""
    draws = run.task.sample_draws
    if found is None or draws is None:
        return
    metrics, intervals = summary.fidelity(found, draws)
    row["metrics"] |= metrics
    row["intervals"] |= {"perplexity": intervals["perplexity"]} if is_reference else intervals
    row["error_by_layer"] = found.error_by_layer
    if not is_reference and found.kl is not None and found.error_by_layer is None:
        run.notes.append(f"{row['name']} has blocks of another number or width than the reference: no error by layer.")


def _reasoning(run: _Run, row: dict[str, Any], model: Model, checkpoint: Checkpoint, is_reference: bool) -> None:
    prompts, draws, name = run.task.prompts, run.task.problem_draws, row["name"]
    if prompts is None or draws is None:
        return
    tokenizer = run.tokenizer
    if not _same_tokenizer(tokenizer, checkpoint):
        tokenizer = load_tokenizer(checkpoint.path)
        prompts = reasoning.prepare(prompts.problems, tokenizer)
    verdicts = reasoning.answer(
        model,
        tokenizer,
        prompts,
        lambda done, total: run.step(f"{name}: {done} of {total} problems", 0.1 + 0.8 * done / total),
    )
    metrics, intervals = summary.reasoning(verdicts, draws)
    row["metrics"] |= metrics
    row["intervals"] |= intervals
    row["families"] = summary.families(verdicts, [problem.family for problem in prompts.problems])
    if is_reference:
        run.reference = verdicts
        row["relative"] = dict.fromkeys(summary.REASONING, 1.0)
    elif run.reference is not None:
        row["relative"], paired = summary.against(verdicts, run.reference, draws)
        row["intervals"] |= paired


def _same_tokenizer(tokenizer: Tokenizer, checkpoint: Checkpoint) -> bool:
    mine, theirs = tokenizer.path / "tokenizer.json", checkpoint.path / "tokenizer.json"
    return theirs.is_file() and (mine == theirs or mine.read_bytes() == theirs.read_bytes())


def _lineage(checkpoint: Checkpoint) -> list[Any]:
    return list((checkpoint.manifest or {}).get("lineage") or [])


def _suite(run: _Run) -> dict[str, Any] | None:
    prompts = run.task.prompts
    if prompts is None or run.streamed is not None:
        return None
    names = [problem.family for problem in prompts.problems]
    counts = {family: names.count(family) for family in dict.fromkeys(names)}
    return {
        "name": run.settings.suite,
        "problems": len(names),
        "seed": reasoning.SEED,
        "families": counts,
        "max_new_tokens": prompts.limit,
    }


def _text(run: _Run) -> dict[str, Any] | None:
    if not run.task.samples:
        return None
    source = "the reference solutions of the problems" if run.settings.text is None else run.settings.text.name
    predicted = sum(sample.predicted for sample in run.task.samples)
    length = None if run.settings.text is None else run.settings.length
    mode = "in memory" if run.streamed is None else "teacher-forced, streamed"
    found = {"source": source, "windows": len(run.task.samples), "length": length, "tokens": predicted}
    return {**found, "mode": mode}

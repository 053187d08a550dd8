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

from deepseek_compress import machine, processes, provenance
from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.compress.summary import coverage, weight_errors
from deepseek_compress.errors import DscError, Problems, raise_problems
from deepseek_compress.evaluation import (
    certainty,
    deployed,
    divergence,
    efficiency,
    process,
    reasoning,
    safety,
    speed,
    streamed,
    summary,
    until,
    where,
)
from deepseek_compress.evaluation.about import about, seen_before
from deepseek_compress.evaluation.answering import Answerer, Answers, FromModel
from deepseek_compress.evaluation.divergence import Divergence
from deepseek_compress.evaluation.process import Judged
from deepseek_compress.evaluation.progress import TimeLeft
from deepseek_compress.evaluation.reasoning import Prompts
from deepseek_compress.evaluation.row import empty_row
from deepseek_compress.evaluation.streamed import Subject
from deepseek_compress.evaluation.task import Settings, Task, prepare, suite_of, text_of
from deepseek_compress.evaluation.trace import Trace
from deepseek_compress.models import Architecture
from deepseek_compress.models.cache import cache_bytes, cache_problems, kv_rounding
from deepseek_compress.models.resolve import name_of
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import Tokenizer, load_tokenizer
from deepseek_compress.numerics.kv_cache import KvRounding
from deepseek_compress.streaming.loop import Progress, silent

SCHEMA = 1
USUAL = Settings()

OTHER_TOKENIZER = "{} has another tokenizer than the reference: perplexity and KL are unknown."
TEACHER_FORCED = "Run block by block over given text (teacher-forced): nothing was generated; no exact match, no speed."


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
    reference: Sequence[Judged] | None = None
    work: Path | None = None  # where answers are kept as they come
    level: float = certainty.LEVEL
    first: str | None = None  # name of the reference
    done: int = 0

    def step(self, note: str, share: float = 0.0) -> None:
        """Tell how far it is: 100 parts a model."""
        self.progress(round(100 * (self.done + share)), 100 * self.total, note)


def evaluate(
    models: Mapping[str, Path],
    reference: str | None,
    settings: Settings = USUAL,
    ablations: Mapping[str, Path] | None = None,
    progress: Progress = silent,
    work: Path | None = None,
) -> dict[str, Any]:
    """Return the record of `models` (name -> directory, in the order of the pipeline) and of `ablations`.

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
    notes = [] if settings.text is None else seen_before(settings.text, checkpoints)
    run = _Run(settings, tokenizer, task, notes, progress, len(everything) + len(settings.deployed))
    rows: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory(prefix="dsc-evaluate-") as folder, processes.one_server():
        run.work, run.first = work or Path(folder), reference
        if settings.until is not None and reference is not None and task.prompts is not None:
            _until(run, checkpoints, reference, settings.until)
        if _is_streamed(settings, checkpoints):
            ordered = dict(sorted(checkpoints.items(), key=lambda item: item[0] != first))
            run.streamed = _streamed(run, ordered, reference, work or Path(folder))
        for name in sorted(everything, key=lambda name: name != first):  # the reference first; sorting is stable
            rows[name] = _row(run, name, checkpoints[name], Path(folder) if name == reference else None)
            run.done += 1
        for name, target in settings.deployed.items():
            rows[name] = deployed_row(run, name, target)
            run.done += 1
        if settings.deployed and settings.efficiency and run.streamed is None:
            _speeds(run, rows, checkpoints)
    run.step("done")
    return finish(run, rows, [*models, *settings.deployed], reference)


def finish(
    run: _Run, rows: Mapping[str, dict[str, Any]], names: Sequence[str], reference: str | None
) -> dict[str, Any]:
    """Return the record, in the order of the schema."""
    certainty.correct([row["certainty"] for row in rows.values() if row["certainty"]])
    record = {
        "schema": SCHEMA,
        "reference": reference,
        "models": [rows[name] for name in names],
        "artifacts": [],
        "machine": machine.describe(),
        "versions": dict(provenance.versions()),
        "ablations": [row for name, row in rows.items() if name not in names],
        "suite": None if run.streamed is not None else suite_of(run.settings, run.task.prompts),
        "text": text_of(run.settings, run.task, run.streamed is not None),
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
    """Return the rounding of a model's keys and values."""
    return (None if is_reference else run.settings.kv_cache) or kv_rounding(checkpoint.kv_cache)


def _row(run: _Run, name: str, checkpoint: Checkpoint, folder: Path | None) -> dict[str, Any]:
    """Everything about one model. With a folder it is the reference, and its trace is kept there."""
    run.step(f"{name}: reading")
    row = {**empty_row(name, name_of(checkpoint.path)), **efficiency.sizes(checkpoint)}
    rounding = _rounding(run, folder is not None, checkpoint)
    row |= {"lineage": _lineage(checkpoint), "about": about(checkpoint, rounding)}
    size = cache_bytes(Architecture.of(checkpoint).cfg, rounding, run.settings.length)
    row["kv_cache_bytes_per_token"] = None if size is None else size.stored
    row["expert_coverage"], row["weight_errors"] = coverage(checkpoint.path), weight_errors(checkpoint.path)
    if run.streamed is not None:
        _report(run, row, run.streamed.get(name), folder is not None)
        return row
    if run.task.prompts or run.task.samples or run.settings.safety:
        model = Model.load(checkpoint, kv_cache=rounding, device=run.settings.limits.device)
        _fidelity(run, row, model, checkpoint, folder)
        _reasoning(run, row, model, checkpoint, folder is not None)
        own = run.tokenizer if _same_tokenizer(run.tokenizer, checkpoint) else load_tokenizer(checkpoint.path)
        _safety(run, row, FromModel(model, own), lambda some: divergence.measure(model, some).nll, own)
        del model
        gc.collect()
    if run.settings.efficiency and not run.settings.deployed:  # else all are timed in turns
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
    row["choice_by_layer"], row["outliers_by_layer"] = found.choice_by_layer, found.outliers_by_layer
    row["experts_by_layer"] = found.experts_by_layer
    if found.positions is not None:
        row["kl"] = where.spread(found.positions, run.task.samples, run.tokenizer.decode)
    if not is_reference and found.kl is not None and found.error_by_layer is None and not row.get("target"):
        run.notes.append(f"{row['name']} has blocks of another number or width than the reference: no error by layer.")


def _reasoning(run: _Run, row: dict[str, Any], model: Model, checkpoint: Checkpoint, is_reference: bool) -> None:
    prompts = run.task.prompts
    if prompts is None:
        return
    tokenizer = run.tokenizer
    if not _same_tokenizer(tokenizer, checkpoint):
        tokenizer = load_tokenizer(checkpoint.path)
        prompts = reasoning.prepare(prompts.problems, tokenizer, prompts.asking)
    _answers(run, row, FromModel(model, tokenizer), tokenizer, prompts, is_reference)


def _answers(
    run: _Run, row: dict[str, Any], answerer: Answerer, tokenizer: Tokenizer, prompts: Prompts, is_reference: bool
) -> None:
    """Ask every question and put what came of it into the row."""
    draws, name, many = run.task.problem_draws, row["name"], prompts.asking.samples
    assert draws is not None
    kept = Answers(run.work / f"answers-{name}.jsonl" if run.work else None)
    left = TimeLeft()
    found = reasoning.ask(
        answerer,
        tokenizer,
        prompts,
        kept,
        lambda done, total: run.step(f"{name}: {left(done, total)}", 0.1 + 0.8 * done / total),
    )
    verdicts = [one.verdict for one in found]
    metrics, intervals = summary.reasoning(verdicts, draws, many)
    row["metrics"] |= metrics
    row["intervals"] |= intervals
    row["families"] = summary.families(verdicts, [p.family for p in prompts.problems for _ in range(many)])
    row["process"] = process.summary(found, None if is_reference else run.reference)
    row["sampled"] = summary.sampled(verdicts, many)
    if is_reference:
        run.reference = found
        row["relative"] = dict.fromkeys(summary.REASONING, 1.0)
    elif run.reference is not None:
        theirs = [one.verdict for one in run.reference]
        row["relative"], paired = summary.against(verdicts, theirs, draws, many)
        row["intervals"] |= paired
        mine = summary.scores(verdicts, many)["exact_match"]
        row["certainty"] = certainty.paired(mine, summary.scores(theirs, many)["exact_match"], draws, run.level)
        row["flips"] = process.flips(prompts.problems, found, run.reference, many)


def _safety(
    run: _Run, row: dict[str, Any], answerer: Answerer, likelihood: safety.Likelihood | None, tokenizer: Tokenizer
) -> None:
    if run.settings.safety is not None:
        run.step(f"{row['name']}: safety", 0.85)
        kept = run.work / f"safety-{row['name']}.jsonl" if run.work else None
        row["safety"] = run.settings.safety(answerer, likelihood, tokenizer, kept, run.first == row["name"])


def _until(run: _Run, checkpoints: Mapping[str, Checkpoint], reference: str, points: float) -> None:
    """Ask as many problems as settle the difference; the report is about those."""
    prompts = run.task.prompts
    assert prompts is not None
    others = [name for name in (*checkpoints, *run.settings.deployed) if name != reference]

    def scores(name: str, count: int) -> list[float]:
        run.step(f"{name}: {count} problems")
        tokenizer: Tokenizer | None = run.tokenizer
        if name in checkpoints:
            rounding = _rounding(run, name == reference, checkpoints[name])
            model = Model.load(checkpoints[name], kv_cache=rounding, device=run.settings.limits.device)
            tokenizer = load_tokenizer(checkpoints[name].path)
            answerer: Answerer = FromModel(model, tokenizer)
        else:
            opened = deployed.open_file(run.settings.deployed[name])
            answerer, tokenizer = opened.answerer, opened.tokenizer
        tokenizer = tokenizer or run.tokenizer
        mine = prompts
        if tokenizer.digest != run.tokenizer.digest:
            mine = reasoning.prepare(prompts.problems, tokenizer, prompts.asking)
        some = reasoning.first(mine, count)
        kept = Answers(run.work / f"answers-{name}.jsonl" if run.work else None)
        verdicts = [one.verdict for one in reasoning.ask(answerer, tokenizer, some, kept)]
        return summary.scores(verdicts, some.asking.samples)["exact_match"]

    found = until.settle(points, len(prompts.problems), reference, others, scores, run.settings.seed)
    run.level = found.level
    run.task = run.task.first(found.problems, run.settings.seed)
    what = "settled" if found.done else "not settled"
    run.notes.append(f"A difference of {points:g} points was {what} after {found.problems:,} problems.")


def deployed_row(run: _Run, name: str, target: str) -> dict[str, Any]:
    """Everything about a file that answers in its own runtime, or a server."""
    run.step(f"{name}: opening")
    opened = deployed.open_file(target)
    row: dict[str, Any] = {**empty_row(name, target), "bytes": opened.bytes, "about": opened.about, "target": target}
    row["lineage"] = list(opened.lineage)
    if run.trace is not None and opened.predict is not None and run.task.samples:
        run.step(f"{name}: next-token distribution", 0.05)
        if opened.same_tokenizer(run.tokenizer):
            _report(run, row, divergence.measure_logits(opened.predict, run.task.samples, run.trace), False)
        else:
            run.notes.append(OTHER_TOKENIZER.format(name))
    if run.task.prompts is not None:
        tokenizer, prompts = opened.tokenizer or run.tokenizer, run.task.prompts
        if opened.tokenizer is not None and not opened.same_tokenizer(run.tokenizer):
            prompts = reasoning.prepare(prompts.problems, tokenizer, prompts.asking)
        _answers(run, row, opened.answerer, tokenizer, prompts, False)
    logits = opened.predict
    likelihood = None if logits is None else lambda some: safety.from_logits(logits, some)
    _safety(run, row, opened.answerer, likelihood, opened.tokenizer or run.tokenizer)
    return row


def _speeds(run: _Run, rows: Mapping[str, dict[str, Any]], checkpoints: Mapping[str, Checkpoint]) -> None:
    """Speed of the models and of the deployed files in turns, as far as all fit into memory together."""
    targets = {name: str(checkpoint.path) for name, checkpoint in checkpoints.items()}
    targets |= {name: t for name, t in run.settings.deployed.items() if not t.startswith(deployed.HTTP)}
    need = sum(4 * (rows[name]["parameters"] or 0) or 2 * (rows[name]["bytes"] or 0) for name in targets)
    if need > (machine.memory() or need) / 2:
        run.notes.append("Speed: not measured in turns, the models do not fit into memory together.")
        return
    found = speed.measure(targets, progress=lambda done, total: run.step(f"speed: turn {done} of {total}"))
    for name, entry in found.items():
        rows[name]["speed"] = entry


def _same_tokenizer(tokenizer: Tokenizer, checkpoint: Checkpoint) -> bool:
    mine, theirs = tokenizer.path / "tokenizer.json", checkpoint.path / "tokenizer.json"
    return theirs.is_file() and (mine == theirs or mine.read_bytes() == theirs.read_bytes())


def _lineage(checkpoint: Checkpoint) -> list[Any]:
    return list((checkpoint.manifest or {}).get("lineage") or [])

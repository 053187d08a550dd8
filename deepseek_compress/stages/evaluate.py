"""Measure models against a reference on the same problems and tokens, and write the report."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from deepseek_compress.checkpoint import Checkpoint, Header, is_checkpoint, open_checkpoint
from deepseek_compress.checkpoint.files import remove_tree
from deepseek_compress.checkpoint.owned import announce
from deepseek_compress.checkpoint.verified import MANIFEST, RUN, hash_of
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.reasoning import BUILTIN, SUITES, known
from deepseek_compress.generation.sampling import Sampling
from deepseek_compress.numerics.kv_cache import KvRounding
from deepseek_compress.stages.base import Context, Forecast, Output, Stage
from deepseek_compress.stages.resumable import Resumable

LIMIT = 8000  # built-in problems that `until` asks at most
WORK = ".dsc_evaluate"  # in the output directory, while a streamed run is unfinished


class Evaluate(Stage, frozen=True, extra="forbid"):
    """Perplexity, KL and top-1 agreement, answers to questions, size, speed and memory, of several models.

    Without `text` the fidelity metrics are taken on the reference solutions of the questions, and all of a file are
    asked, 1,000 of a suite; with `text` on its windows, and problems are asked only where `problems` says how many.
    """

    writes: ClassVar[str] = "report"
    models: tuple[str, ...] = ()  # names of outputs in the order of the pipeline; empty: the input and every checkpoint
    reference: str | None = None  # a name of `models`; None: the first of them where there are several
    ablations: tuple[str, ...] = ()  # reported apart from the pipeline
    suite: str | tuple[str, ...] = BUILTIN  # builtin, or .jsonl or .parquet files of questions
    instruction: str | None = None  # written after each question of a file
    shots: int = Field(0, ge=0)  # questions at the start of a file that are shown with their answers, and not asked
    max_new_tokens: int | None = Field(None, gt=0)  # of an answer; None: half again the longest reference solution
    sampling: Sampling = Sampling()  # greedy; R1 is judged at {temperature: 0.6, top_p: 0.95}
    samples: int = Field(1, gt=0, le=1000)  # answers to each question: pass@k
    scorer: Literal["numbers", "strict", "flexible"] = "numbers"  # the latter as lm-evaluation-harness scores GSM8K
    until: float | None = Field(None, gt=0)  # points: ask more problems until such a difference is settled
    safety: str | None = None  # builtin, or a .jsonl file of paired completions: aspects, refusals, bias
    deployed: Mapping[str, str] = Field({})  # name -> what `dsc generate` opens: an exported file, or a server
    asked: int | None = Field(None, ge=0, alias="problems")  # `problems` is what every stage tells about a header
    text: Path | None = None
    windows: int = Field(64, gt=0)
    length: int = Field(512, gt=1)
    efficiency: bool = True
    kv_cache: KvRounding | None = None  # how keys and values of all but the reference are stored; None: by manifest
    streamed: bool | None = None  # block by block, nothing generated; None: where a model does not fit into memory

    @field_validator("suite")
    @classmethod
    def _known(cls, names: str | tuple[str, ...]) -> str | tuple[str, ...]:
        for name in [names] if isinstance(names, str) else names:
            if not known(name):
                what = f"unknown suite {name!r}"
                raise DscError(what, f"valid names: {', '.join(SUITES)}, or a .jsonl or .parquet file of questions")
        return names

    @model_validator(mode="after")
    def _agree(self) -> Evaluate:
        if self.samples > 1 and not self.sampling.temperature:
            raise DscError(
                f"samples: {self.samples} greedy answers would all be the same", "set sampling.temperature=0.6"
            )
        return self

    def problems(self, header: Header) -> list[DscError]:
        """Return a file of questions or a deployed file that is not there."""
        found = [
            DscError(f"{name}: no such file", "give a .jsonl or .parquet file of questions and answers, or builtin")
            for name in self._suites
            if name not in SUITES and not Path(name).expanduser().is_file()
        ]
        if self.safety not in (None, BUILTIN) and not Path(str(self.safety)).expanduser().is_file():
            found.append(DscError(f"{self.safety}: no such file", f"give a .jsonl file of pairs, or {BUILTIN}"))
        return found + [
            DscError(f"{target}: no such file or directory", "give an output of dsc export, or http://HOST:PORT")
            for target in self.deployed.values()
            if not target.startswith("http") and not Path(target).expanduser().exists()
        ]

    @property
    def _suites(self) -> tuple[str, ...]:
        return (self.suite,) if isinstance(self.suite, str) else self.suite

    def reads(self) -> Sequence[str]:
        """Every model it names."""
        named = [*self.models, *self.ablations, *([self.reference] if self.reference else [])]
        return tuple(dict.fromkeys(named))

    def forecast(self, header: Header, samples: int, length: int) -> Forecast:
        """For a model and a reference of the same shapes; where both fit into memory that is not foreseen."""
        from deepseek_compress.evaluation import streamed

        windows, tokens = (self.windows, self.length) if self.text else (400, 64)
        if self.streamed is False or (self.streamed is None and streamed.fits(header, None)):
            return Forecast(header)
        memory, work, tasks = streamed.cost(header, windows, tokens)
        read = 2 * header.bytes
        return Forecast(header, bytes=16 * windows * tokens * 4, memory=memory, work=work, tasks=tasks, read=read)

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write report.json, report.md and report.html into the stage's directory."""
        from deepseek_compress.evaluation.record import evaluate
        from deepseek_compress.reports import write

        models, work = self._models(context.outputs), context.out / WORK
        several = len(models) + len(self.deployed) > 1
        reference = self.reference or (next(iter(models)) if several else None)
        ablations = {name: _path(context.outputs, name) for name in self.ablations}
        self._claim(source, {**models, **ablations}, context, work)
        with self._check(context) as check:
            settings = replace(self._settings(context), safety=check)
            record = evaluate(models, reference, settings, ablations, context.progress, work)
        context.tell_all(record["notes"])
        record["artifacts"] = artifacts(context.outputs)
        record["name"] = title(context.recipe_text, list(models), reference)
        record["recipe"] = context.recipe_text
        path = context.out / "report.json"
        announce(context.out, [path.with_suffix(suffix).name for suffix in (".json", ".md", ".html")])
        write(record, path)
        remove_tree(work)
        return Output("report", path, {"report": str(path), "models": len(models)})

    @contextmanager
    def _check(self, context: Context) -> Iterator[Any]:
        """Give what is asked of safety; the filter's process ends with it."""
        from deepseek_compress.evaluation import filters, safety
        from deepseek_compress.tasks.pairs import read_pairs

        if self.safety is None:
            if context.filter is not None:
                raise DscError("--filter without prompts to filter", "add --set evaluate.safety=builtin, or a file")
            yield None
            return
        pairs = read_pairs(self.safety)
        chosen = None if context.filter is None else filters.Filter(context.filter, filters.SECONDS)
        try:
            yield safety.Check(pairs, context.seed, self.max_new_tokens or safety.NEW_TOKENS, chosen)
        finally:
            if chosen is not None:
                chosen.close()

    def _models(self, outputs: Mapping[str, Path]) -> dict[str, Path]:
        """Name -> directory, in the order of the recipe. The reference is first where `models` leaves it out."""
        names = list(self.models) or [name for name, path in _unique(outputs).items() if is_checkpoint(path)]
        if self.reference and self.reference not in names:
            names.insert(0, self.reference)
        return {name: _path(outputs, name) for name in names if name not in self.ablations}

    def _claim(self, source: Checkpoint, models: Mapping[str, Path], context: Context, work: Path) -> None:
        """Take up the work directory of the same evaluation."""
        from deepseek_compress import provenance
        from deepseek_compress.evaluation.deployed import fingerprint

        prints = {name: provenance.fingerprint(open_checkpoint(path)) for name, path in models.items()}
        files = [Path(name).expanduser() for name in self._suites if name not in SUITES]
        files += [Path(self.safety).expanduser()] if self.safety not in (None, BUILTIN) else []
        text = "/".join(hash_of(file) for file in [*files, *([self.text] if self.text else [])]) or None
        knobs = {**self.model_dump(mode="json"), "models": prints, "filter": _code(context.filter)}
        knobs["deployed"] = {name: fingerprint(target) for name, target in self.deployed.items()}
        Resumable.of(source, knobs, text, seed=context.seed, device=context.device).claim(context.out, work)

    def _settings(self, context: Context) -> Any:
        from deepseek_compress.evaluation.streamed import Limits
        from deepseek_compress.evaluation.task import Settings

        asks = self.asked != 0 and (self.asked is not None or self.text is None or self.suite != BUILTIN)
        return Settings(
            suite=self.suite if asks else None,
            problems=self.asked if self.asked or not self.until or self.suite != BUILTIN else LIMIT,
            instruction=self.instruction,
            shots=self.shots,
            max_new_tokens=self.max_new_tokens,
            sampling=self.sampling,
            samples=self.samples,
            deployed=self.deployed,
            until=self.until,
            scorer=self.scorer,
            text=self.text,
            windows=self.windows,
            length=self.length,
            efficiency=self.efficiency,
            seed=context.seed,
            kv_cache=self.kv_cache,
            streamed=self.streamed,
            limits=Limits(context.memory, context.workers, context.device),
        )


def _code(function: str | None) -> str | None:
    """Hash of FILE in FILE.py:FUNCTION."""
    file = Path((function or "").rpartition(":")[0])
    return hash_of(file) if file.is_file() else None


def title(recipe: str, models: Sequence[str], reference: str | None) -> str:
    """Return the name that the recipe gives itself, else what is compared with what."""
    named = re.search(r"^name: *([\w.-]+) *$", recipe, re.MULTILINE)
    if named:
        return named[1]
    others = [name for name in models if name != reference]
    if not others:
        return models[0]
    return f"{others[-1]} against {reference}" if reference else others[-1]


def artifacts(outputs: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Rows about the outputs that are not checkpoints: engines and graphs, with what their stage said about them."""
    rows = []
    for name, path in _unique(outputs).items():
        facts = _facts(path if path.is_dir() else path.parent)
        if not path.exists() or is_checkpoint(path) or "target" not in facts:
            continue
        files = path.parent.glob(f"{path.name}*") if path.is_file() else path.rglob("*")
        size = sum(file.stat().st_size for file in files if file.is_file())  # model.onnx and model.onnx.data
        row = {"name": name, "target": facts["target"], "path": str(path), "bytes": size, "status": facts.get("status")}
        rows.append({**row, "note": _note(facts), "verification": facts.get("verification")})
    return rows


def _note(facts: Mapping[str, Any]) -> str:
    """Return what was verified about the file, in words."""
    parts = []
    found = facts.get("verification")
    if found:
        subject = "its ONNX logits" if facts.get("onnx_bytes") else "logits"
        parts.append(
            f"{subject} at KL {found['kl']:.1g} from the runtime's over {found['positions']} positions, "
            f"{found['agreed']} of {found['decoded']} clear greedy tokens equal"
        )
    return "; ".join([*parts, *([facts["sparsity"]] if facts.get("sparsity") else [])])


def _path(outputs: Mapping[str, Path], name: str) -> Path:
    if name not in outputs:
        raise DscError(f"unknown output {name!r}", f"valid names: {', '.join(outputs)}")
    return outputs[name]


def _unique(outputs: Mapping[str, Path]) -> dict[str, Path]:
    """Each output once: the input stands there as `model` and under the recipe's own name for it, which is kept."""
    named = {name: path for name, path in outputs.items() if name != "model"}
    if "model" in outputs and outputs["model"] not in named.values():
        named = {"model": outputs["model"], **named}
    return named


def _facts(folder: Path) -> dict[str, Any]:
    """Return what the stage that wrote the artifact recorded: its manifest, then the facts of its run."""
    found: dict[str, Any] = {}
    for name in (MANIFEST, RUN):
        file = folder / name
        if file.is_file():
            content = json.loads(file.read_text(encoding="utf-8"))
            found |= content.get("knobs") or {}
            found |= {key: content[key] for key in ("target", "status") if content.get(key)}
            found |= content.get("facts") or {}
    return found

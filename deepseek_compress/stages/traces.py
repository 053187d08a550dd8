"""Traces: a teacher solves problems, a verifier judges every step, and the right solutions are text to train on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from deepseek_compress import provenance
from deepseek_compress.calibration.sources import BUILTIN, read_samples
from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.files import remove_tree, write_file
from deepseek_compress.checkpoint.owned import announce
from deepseek_compress.checkpoint.verified import hash_of
from deepseek_compress.distillation.traces import TRACES, Settings, Teacher, write_traces
from deepseek_compress.distillation.user_verifier import UserVerifier
from deepseek_compress.distillation.verifiers import Asked, builtin_problems, problems_of, verifier_of
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.planning.costs import Memory, Work
from deepseek_compress.stages.base import Context, Forecast, Output, Stage
from deepseek_compress.stages.resumable import Resumable

WORK = ".dsc_traces"  # in the output directory, while a run is unfinished
BUILTIN_COUNT = 500  # problems, where nothing says how many


class Traces(Stage, frozen=True):
    """Solutions of a teacher that a verifier found right: `distill: {text: NAME}` trains on them."""

    writes: ClassVar[str] = "artifact"
    # auto: the one of --verifier; else builtin for the built-in problems, answer for a file
    verifier: Literal["auto", "builtin", "answer", "python", "none"] = "auto"
    count: int | None = Field(None, gt=0)  # problems that are asked; None: all of the text, 500 built-in ones
    attempts: int = Field(4, gt=0)  # at a problem; the first is greedy
    temperature: float = Field(0.7, gt=0)  # of the others
    limit: int = Field(512, gt=1)  # tokens of an answer
    least: float = Field(
        0.7, ge=0, le=1
    )  # score of a trace that is kept: 0.7 for the answer, 0.3 x share of valid steps
    seconds: float = Field(10.0, gt=0)  # that a Python verifier may take

    def problems(self, header: Header) -> list[DscError]:
        """Return a missing, unknown or misshaped tensor."""
        return Architecture.of(header).problems()

    def forecast(self, header: Header, samples: int, length: int) -> Forecast:
        """Return the teacher in float32."""
        total = sum(info.elements for info in header.tensors.values())
        work = None if self.count is None else Work(2.0 * total * self.count * self.limit)
        return Forecast(header, memory=Memory(5 * total), work=work)

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write traces.jsonl to `context.out`; finished batches of problems are kept."""
        name = self._name(context)
        work, asked = context.out / WORK, self._asked(name, context)
        function = None if context.verifier is None else UserVerifier(context.verifier, self.seconds)
        text = provenance.digest([[one.messages, one.answer] for one in asked])
        code = None if function is None else hash_of(function.path)
        knobs = {**self.model_dump(mode="json"), "code": code}
        Resumable.of(source, knobs, text, seed=context.seed, device=context.device).claim(context.out, work)
        verifier = verifier_of(name, function)
        least = 0.0 if name == "none" else self.least
        settings = Settings(self.attempts, self.temperature, self.limit, context.seed, least)
        model = Model.load(source, device=context.device)
        teacher = Teacher(model, load_tokenizer(source.path), verifier, settings)
        if function is None:
            lines = write_traces(teacher, asked, work, context.progress)
        else:
            with closing(function):
                lines = write_traces(teacher, asked, work, context.progress)
        return self._finish(lines, asked, work, context)

    def _name(self, context: Context) -> str:
        """Of the verifier."""
        if self.verifier == "auto":
            only = [source.path for source in context.text.sources] == [BUILTIN]
            return "python" if context.verifier else "builtin" if only else "answer"
        if self.verifier != "python" and context.verifier is not None:
            what = f"--verifier {context.verifier}: traces.verifier is {self.verifier}"
            raise DscError(what, "leave one of them out")
        return self.verifier

    def _asked(self, name: str, context: Context) -> list[Asked]:
        if name == "builtin":
            return builtin_problems(context.seed, self.count or BUILTIN_COUNT)
        samples = (sample for source in context.text.sources for sample in read_samples(source.path))
        return list(problems_of(samples, self.count, name == "answer"))

    def _finish(self, kept: list[dict[str, Any]], asked: Sequence[Asked], work: Path, context: Context) -> Output:
        """Write the traces."""
        share = f"{len(kept)} of {len(asked)} problems have a trace"
        if not kept:
            raise DscError(f"{context.name}: {share}", "ask a better teacher, more attempts, or set least lower")
        revised = sum(line["attempt"] > 0 for line in kept)
        context.tell(f"{share}: {len(kept) - revised} at the first attempt, {revised} at a later one")
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in kept)
        announce(context.out, [TRACES])
        write_file(context.out / TRACES, content.encode("utf-8"))
        remove_tree(work)
        score = sum(line["score"] for line in kept) / len(kept)
        facts = {"asked": len(asked), "kept": len(kept), "revised": revised, "mean_score": round(score, 4)}
        return Output("artifact", context.out, facts)

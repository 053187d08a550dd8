"""Traces: solutions that a teacher writes, judged, and kept where they are right (how DeepSeek-R1 was distilled,
arXiv 2501.12948, section 2.4).

    attempt 0   greedy
    attempt i   drawn at a temperature, after the first steps of the attempt before as far as they hold

A problem is asked again until an attempt is right and scores enough, at most `attempts` times, or is dropped.
What is kept is a line of `traces.jsonl` that any reader of training text takes:

    {"prompt", "completion", "score", "valid_steps", "written_steps", "attempt", "origin"}

Problems are asked in batches, and a batch is safe on the disk once it is judged: an interrupted run goes on behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_compress.checkpoint.files import kept, read_sealed, write_sealed
from deepseek_compress.distillation.on_policy import Drawn
from deepseek_compress.distillation.verifiers import Asked, Verdict, Verifier
from deepseek_compress.models.runtime import Choose, Model, greedy
from deepseek_compress.models.tokenizer import Tokenizer
from deepseek_compress.streaming.loop import Progress
from deepseek_compress.tasks.vocabulary import THINK

TRACES = "traces.jsonl"
BATCH = 64  # problems that are asked together


class Settings(NamedTuple):
    """Sampling of a teacher's solutions."""

    attempts: int
    temperature: float  # of all attempts but the first
    limit: int  # tokens of an answer; one that is cut there is wrong
    seed: int
    least: float = 0.0  # score; what is right by steps that are wrong is asked again too


@dataclass(frozen=True)
class _Try:
    text: str
    verdict: Verdict
    attempt: int


class Teacher:
    """A model that solves problems."""

    def __init__(self, model: Model, tokenizer: Tokenizer, verifier: Verifier, settings: Settings) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.verifier, self.settings = verifier, settings

    def solve(self, problems: Sequence[Asked], first: int) -> list[dict[str, Any] | None]:
        """Return a trace of each problem, None where no attempt is right; `first` is the number of the first of
        them."""
        found: list[_Try | None] = [None] * len(problems)
        beginnings = [""] * len(problems)
        for attempt in range(self.settings.attempts):
            open_ = [i for i, before in enumerate(found) if before is None]
            if not open_:
                break
            choose = greedy if attempt == 0 else self._drawn(first, attempt)
            for i, (text, ended) in zip(
                open_, self._write([problems[i] for i in open_], [beginnings[i] for i in open_], choose), strict=True
            ):
                verdict = self.verifier.judge(problems[i], text) if ended else Verdict(False, 0, 0)
                if verdict.right and verdict.score >= self.settings.least:
                    found[i] = _Try(text, verdict, attempt)
                else:
                    beginnings[i] = self.verifier.sound(problems[i], text) if ended else ""
        return [None if done is None else _line(asked, done) for asked, done in zip(problems, found, strict=True)]

    def _drawn(self, first: int, attempt: int) -> Drawn:
        return Drawn(self.settings.temperature, (self.settings.seed * 1_000_003 + first) * 101 + attempt)

    def _write(self, problems: Sequence[Asked], beginnings: Sequence[str], choose: Choose) -> list[tuple[str, bool]]:
        """Return the whole completion of each problem, its beginning included, and whether it came to its end."""
        tokenizer, limit = self.tokenizer, self.settings.limit
        asked = [tokenizer.chat(list(problem.messages), answer_next=True) for problem in problems]
        special = not tokenizer.has_chat_template  # a template writes its own special tokens
        opened = [text.rstrip().endswith(THINK) for text in asked]
        begun = [begin.removeprefix(THINK) if open_ else begin for begin, open_ in zip(beginnings, opened, strict=True)]
        spaces = [" " if begin and not text[-1:].isspace() else "" for text, begin in zip(asked, begun, strict=True)]
        prompts = tokenizer.encode_many(["".join(parts) for parts in zip(asked, spaces, begun, strict=True)], special)
        written = self.model.generate(prompts, limit, tokenizer.eos_ids or None, BATCH, choose)
        texts = [tokenizer.decode(ids, skip_special=False) for ids in written]
        return [
            (_joined(THINK if open_ else "", begin, text), len(ids) < limit)
            for open_, begin, text, ids in zip(opened, begun, texts, written, strict=True)
        ]


def write_traces(teacher: Teacher, problems: Sequence[Asked], work: Path, progress: Progress) -> list[dict[str, Any]]:
    """Return the traces of all problems in their order; finished batches lie in `work` and are not asked again."""
    lines: list[dict[str, Any]] = []
    for first in range(0, len(problems), BATCH):
        file = work / f"batch-{first:08d}.json"
        if kept(file) is None:
            write_sealed(file, {"traces": teacher.solve(problems[first : first + BATCH], first)})
        lines += [line for line in read_sealed(file)["traces"] if line is not None]
        done = min(first + BATCH, len(problems))
        progress(done, len(problems), f"{len(lines)} of {done} solved")
    return lines


def _joined(*parts: str) -> str:
    """Return the parts that are not empty, with a space between two where neither has one."""
    out = ""
    for part in parts:
        glue = " " if out and part and not out[-1].isspace() and not part[0].isspace() else ""
        out += glue + part
    return out


def _line(asked: Asked, done: _Try) -> dict[str, Any]:
    verdict, said = done.verdict, done.text.strip()
    steps = {"valid_steps": verdict.valid, "written_steps": verdict.written}
    judged = {"score": round(verdict.score, 4), **steps, "attempt": done.attempt, "origin": asked.origin}
    if len(asked.messages) == 1:
        return {"prompt": asked.question, "completion": said, **judged}
    return {"messages": [*asked.messages, {"role": "assistant", "content": said}], **judged}

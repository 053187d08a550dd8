"""The questions and tokens that every model gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_compress.evaluation import divergence, reasoning
from deepseek_compress.evaluation.divergence import Sample
from deepseek_compress.evaluation.reasoning import Asking, Prompts
from deepseek_compress.evaluation.safety import Check
from deepseek_compress.evaluation.statistics import Bootstrap
from deepseek_compress.evaluation.streamed import NO_LIMITS, Limits
from deepseek_compress.generation.sampling import Sampling
from deepseek_compress.models.tokenizer import Tokenizer
from deepseek_compress.numerics.kv_cache import KvRounding

SOLUTIONS = 400  # fidelity is a mean over tokens: these hold some 15,000, and each model predicts them all


@dataclass(frozen=True)
class Settings:
    """Choice of measurements. `suite` None: no problems; `text` None: fidelity on the problems' reference solutions."""

    suite: str | Sequence[str] | None = reasoning.BUILTIN  # names of suites, files of questions
    problems: int | None = 1000  # of each; None: all of a file
    text: Path | None = None
    windows: int = 64
    length: int = 512
    efficiency: bool = True
    seed: int = 0  # of the resampling, and of sampled answers
    kv_cache: KvRounding | None = None  # of every model but the reference, instead of what its manifest says
    streamed: bool | None = None  # block by block; None: where a model does not fit into memory
    limits: Limits = NO_LIMITS
    instruction: str | None = None  # after each question
    shots: int = 0  # questions of a file that are shown with their answers, and not asked
    max_new_tokens: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    samples: int = 1  # answers to each question
    scorer: str = "numbers"
    until: float | None = None  # points of difference that shall be settled; `problems` is the limit
    deployed: Mapping[str, str] = field(default_factory=dict)  # name -> what `dsc generate` opens
    safety: Check | None = None  # of paired completions, refusals, bias

    @property
    def suites(self) -> tuple[str, ...]:
        """Their names."""
        return () if self.suite is None else (self.suite,) if isinstance(self.suite, str) else tuple(self.suite)


@dataclass(frozen=True)
class Task:
    """The same questions for every model: prompts, samples to predict, and the resampling of both."""

    prompts: Prompts | None
    samples: Sequence[Sample]
    problem_draws: Bootstrap | None
    sample_draws: Bootstrap | None

    def first(self, count: int, seed: int) -> Task:
        """Return the first `count` problems; the tokens that are predicted stay."""
        prompts = None if self.prompts is None else reasoning.first(self.prompts, count)
        return Task(prompts, self.samples, Bootstrap(count, seed), self.sample_draws)


def prepare(settings: Settings, tokenizer: Tokenizer) -> Task:
    """Tokenise what every model is asked. Raises `DscError` for a text or suite that does not serve."""
    prompts = None
    if settings.suites:
        problems = [p for name in settings.suites for p in _asked(name, settings)]
        shown = next((name for name in settings.suites if name not in reasoning.SUITES), None)
        examples = reasoning.load_suite(shown, settings.shots) if shown and settings.shots else ()
        sampling = settings.sampling.model_copy(update={"seed": settings.seed})
        asking = Asking(
            settings.instruction, examples, settings.max_new_tokens, sampling, settings.samples, settings.scorer
        )
        prompts = reasoning.prepare(problems, tokenizer, asking)
    samples: Sequence[Sample] = prompts.solutions[:SOLUTIONS] if prompts else ()
    if settings.text is not None:
        samples = divergence.text_windows(settings.text, tokenizer, settings.windows, settings.length)
    return Task(
        prompts,
        samples,
        Bootstrap(len(prompts.problems), settings.seed) if prompts else None,
        Bootstrap(len(samples), settings.seed) if samples else None,
    )


def _asked(name: str, settings: Settings) -> Sequence[Any]:
    return reasoning.load_suite(name, settings.problems, 0 if name in reasoning.SUITES else settings.shots)


def suite_of(settings: Settings, prompts: Prompts | None) -> dict[str, Any] | None:
    """Return the entry `suite` of a report."""
    if prompts is None:
        return None
    names = [problem.family for problem in prompts.problems]
    asking = prompts.asking
    return {
        "name": ", ".join(Path(name).name for name in settings.suites),
        "problems": len(names),
        "seed": reasoning.SEED,
        "families": {family: names.count(family) for family in dict.fromkeys(names)},
        "max_new_tokens": prompts.limit,
        "shots": len(asking.examples),
        "instruction": asking.instruction,
        "sampling": str(asking.sampling),
        "samples": asking.samples,
        "scorer": asking.scorer,
    }


def text_of(settings: Settings, task: Task, streamed: bool) -> dict[str, Any] | None:
    """Return the entry `text` of a report."""
    if not task.samples:
        return None
    source = "the reference solutions of the problems" if settings.text is None else settings.text.name
    predicted = sum(sample.predicted for sample in task.samples)
    length = None if settings.text is None else settings.length
    mode = "teacher-forced, streamed" if streamed else "in memory"
    found = {"source": source, "windows": len(task.samples), "length": length, "tokens": predicted}
    return {**found, "mode": mode}

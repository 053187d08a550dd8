"""Verifiers of traces: the built-in tasks' own, the answers of a file, a function of the user's, or none.

Each gives a `Verdict`: whether the answer is right, and how many of the steps that were written hold. The score of a
trace is `0.7 right + 0.3 share of valid steps` (0 without steps), so a right answer reached by wrong steps ranks below
one whose steps hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, Protocol

from deepseek_compress.calibration.sources import Sample
from deepseek_compress.distillation import answers
from deepseek_compress.distillation.user_verifier import UserVerifier
from deepseek_compress.errors import DscError
from deepseek_compress.tasks import Problem, mixture, verify
from deepseek_compress.tasks.vocabulary import END_THINK, THINK

NAMES = ("builtin", "answer", "python", "none")
RIGHT, STEPS = 0.7, 0.3  # shares of the score


class Asked(NamedTuple):
    """A problem that a teacher is to solve."""

    origin: str  # "file.jsonl:12"
    messages: tuple[dict[str, str], ...]  # the last is the user's
    answer: str  # the reference, as it stands in the file; empty where there is none
    problem: Problem | None = None  # of the built-in tasks

    @property
    def question(self) -> str:
        """Text of the question."""
        return self.messages[-1]["content"]


class Verdict(NamedTuple):
    """Judgement of a completion."""

    right: bool
    valid: int  # steps that hold
    written: int  # steps

    @property
    def score(self) -> float:
        """Between 0 and 1."""
        return RIGHT * self.right + (STEPS * self.valid / self.written if self.written else 0.0)


class Verifier(Protocol):
    """Judges completions."""

    def judge(self, asked: Asked, completion: str) -> Verdict:
        """Raise DscError where it cannot."""
        ...

    def sound(self, asked: Asked, completion: str) -> str:
        """Return the beginning of a wrong completion that another attempt may keep: its first steps, as far as they
        hold."""
        ...


class Builtin:
    """The verifier of the built-in tasks, which checks every step."""

    def judge(self, asked: Asked, completion: str) -> Verdict:
        """See `Verifier`."""
        assert asked.problem is not None
        found = verify(asked.problem, completion)
        return Verdict(found.exact, found.valid_steps, found.written_steps)

    def sound(self, asked: Asked, completion: str) -> str:
        """See `Verifier`."""
        steps = completion.partition(END_THINK)[0].removeprefix(THINK).split(" ; ")
        kept = 0
        while kept < len(steps) - 1 and self._hold(asked, steps[: kept + 1]):
            kept += 1
        return f"{THINK} {' ; '.join(step.strip() for step in steps[:kept])} ;" if kept else ""

    def _hold(self, asked: Asked, steps: list[str]) -> bool:
        found = self.judge(asked, f"{THINK} {' ; '.join(steps)} {END_THINK} x")
        return found.valid == found.written == len(steps)


class Answer:
    """Exact match with the answer of the file; equations between numbers are the steps."""

    def judge(self, asked: Asked, completion: str) -> Verdict:
        """See `Verifier`."""
        reference = answers.final_answer(asked.answer) or answers.concluded(asked.answer)
        given = {answers.answer_of(completion), answers.concluded(completion)}
        right = any(answers.same(answer, reference) for answer in given)
        return Verdict(right, *answers.equations(completion))

    def sound(self, asked: Asked, completion: str) -> str:
        """See `Verifier`: whole lines whose equations hold."""
        kept = ""
        for line in completion.splitlines(keepends=True):
            valid, written = answers.equations(line)
            if valid < written or not line.endswith("\n"):
                break
            kept += line
        return kept if kept != completion else ""


class User:
    """A function of the user's."""

    def __init__(self, function: UserVerifier) -> None:
        self.function = function

    def judge(self, asked: Asked, completion: str) -> Verdict:
        """See `Verifier`."""
        return Verdict(*self.function(asked.origin, asked.question, asked.answer, completion))

    def sound(self, asked: Asked, completion: str) -> str:
        """See `Verifier`: nothing is known of steps."""
        return ""


class Anything:
    """No verifier: every completion that ends counts as right."""

    def judge(self, asked: Asked, completion: str) -> Verdict:
        """See `Verifier`."""
        return Verdict(True, 0, 0)

    def sound(self, asked: Asked, completion: str) -> str:
        """See `Verifier`."""
        return ""


def verifier_of(name: str, function: UserVerifier | None) -> Verifier:
    """Return the verifier `name`; `function` where it is the user's. Raises DscError where that is missing."""
    if name == "python":
        if function is None:
            what = "traces.verifier: python, but no function is named, and a recipe cannot name one: it would be code"
            raise DscError(what, "give it on the command line: dsc run RECIPE --verifier FILE.py:FUNCTION")
        return User(function)
    others: dict[str, Verifier] = {"builtin": Builtin(), "answer": Answer(), "none": Anything()}
    return others[name]


def builtin_problems(seed: int, count: int) -> list[Asked]:
    """`count` training problems of the built-in tasks."""
    problems = mixture(seed, count, "train")
    return [
        Asked(f"builtin:{number}", ({"role": "user", "content": problem.prompt},), problem.answer, problem)
        for number, problem in enumerate(problems, 1)
    ]


def problems_of(samples: Iterable[Sample], count: int | None, answered: bool) -> Iterator[Asked]:
    """Yield the problems in calibration text; `answered`: each needs an answer. Raises DscError for a line without."""
    for number, sample in enumerate(samples):
        if count is not None and number >= count:
            return
        messages, answer = sample.messages, ""
        if messages and messages[-1]["role"] == "assistant":
            messages, answer = messages[:-1], messages[-1]["content"]
        if not messages or messages[-1]["role"] != "user":
            raise DscError(f"{sample.origin}: asks nothing", 'each line must be {"question", "answer"}')
        if answered and not answer.strip():
            raise DscError(f"{sample.origin}: no answer to compare with", 'each line must be {"question", "answer"}')
        yield Asked(sample.origin, messages, answer)

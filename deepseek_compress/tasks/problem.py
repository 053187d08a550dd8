"""A problem of the built-in tasks, its verdict, and how hard problems are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from deepseek_compress.tasks.vocabulary import END_THINK, THINK


@dataclass(frozen=True)
class Difficulty:
    """Numbers given are at most `largest`, results at most `limit`; a chain has `shortest`..`longest` steps (<= 5)."""

    largest: int = 99
    limit: int = 999
    shortest: int = 2
    longest: int = 4


@dataclass(frozen=True)
class Problem:
    """`solution` is the reference chain, `<think> step ; step </think> answer`; other right answers may exist."""

    family: str
    kind: str  # the sub-task, which decides how steps are checked
    prompt: str
    steps: tuple[str, ...]
    answer: str
    meta: Mapping[str, Any] = field(default_factory=dict)  # the facts that steps and answer are checked against

    @property
    def solution(self) -> str:
        """The reference completion, without the end-of-sequence word."""
        if "solution" in self.meta:
            return str(self.meta["solution"])
        return f"{THINK} {' ; '.join(self.steps)} {END_THINK} {self.answer}"


class Verdict(NamedTuple):
    """`exact`: the answer is right; `f1`: token F1 of the answer; steps: how many were written, how many hold.

    `first_wrong`: index of the first step that does not hold; `answer`: as it was read, None where there is none;
    `midway`: the chain held the right answer, the end did not.
    """

    exact: bool
    f1: float
    valid_steps: int
    written_steps: int
    first_wrong: int | None = None
    answer: str | None = None
    midway: bool = False

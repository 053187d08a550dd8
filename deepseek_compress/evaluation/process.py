"""Analysis of answers: length, loops, unclosed thoughts, validity step by step, and flips.

A 3-bit reasoner that fails mostly thinks too long (arXiv 2606.00206): the share of right answers alone does not tell
whether a model forgot how to compute or how to stop.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from deepseek_compress.tasks import Problem, Verdict
from deepseek_compress.tasks.vocabulary import END_THINK, THINK

PERIOD, TIMES, LEAST = (
    400,
    4,
    64,
)  # characters of a repeated part at most, how often, and how long all of it is at least
SHOWN, EXCERPT = 10, 1500  # flips of each direction in a report; characters of each answer, from its end


class Attempt(NamedTuple):
    """One answer of a model."""

    text: str
    tokens: int
    cut: bool = False  # it had not ended when the limit was reached


class Judged(NamedTuple):
    """An attempt and what is to be said of it."""

    attempt: Attempt
    verdict: Verdict
    thinking: int | None  # tokens of the chain of thought, None where no chain was begun
    closed: bool
    looped: bool


def judged(attempt: Attempt, verdict: Verdict, count: Callable[[str], int]) -> Judged:
    """`count`: tokens of a text."""
    begun = THINK in attempt.text
    inside, closed, _ = attempt.text.rpartition(THINK)[2].partition(END_THINK)
    thinking = count(inside) if begun else None
    return Judged(attempt, verdict, thinking, bool(closed), looped(attempt.text))


def looped(text: str) -> bool:
    """Whether a text ends in the same part again and again."""
    end = text.rstrip()
    for period in range(1, min(PERIOD, len(end) // TIMES) + 1):
        times = max(TIMES, -(-LEAST // period))
        length = period * times
        if length <= len(end) and end[-length:-period] == end[-length + period :]:
            return True
    return False


def summary(found: Sequence[Judged], reference: Sequence[Judged] | None) -> dict[str, Any]:
    """Return the entry `process` of a report: shares of the answers unless said otherwise."""
    verdicts = [one.verdict for one in found]
    wrong, chains = [v for v in verdicts if not v.exact], [v for v in verdicts if v.written_steps]
    thinking = [one.thinking for one in found if one.thinking is not None]
    first = Counter(v.first_wrong + 1 for v in chains if v.first_wrong is not None)
    tokens = statistics.fmean(one.attempt.tokens for one in found)
    theirs = statistics.fmean(one.attempt.tokens for one in reference) if reference else None
    return {
        "answers": len(found),
        "tokens": tokens,  # mean
        "inflation": tokens / theirs if theirs else None,  # tokens / the reference's
        "thinking_tokens": statistics.fmean(thinking) if thinking else None,  # mean over answers with a chain
        "cut": _share(one.attempt.cut for one in found),
        "looped": _share(one.looped for one in found),
        "no_think": _share(one.thinking is None for one in found) if thinking else None,
        "unclosed_think": _share(one.thinking is not None and not one.closed for one in found) if thinking else None,
        "no_answer": _share(v.answer is None for v in verdicts),
        "right_midway": _share(v.midway for v in wrong) if wrong else None,  # of the wrong answers
        "verified_chains": _share(bool(v.written_steps) and v.first_wrong is None for v in verdicts)
        if chains
        else None,
        "first_wrong_step": {str(step): count for step, count in sorted(first.items())[:12]},
    }


def flips(
    problems: Sequence[Problem], found: Sequence[Judged], reference: Sequence[Judged], samples: int = 1
) -> dict[str, Any]:
    """Answers that changed against the reference's, with some of each direction side by side."""
    lost: list[dict[str, Any]] = []
    gained: list[dict[str, Any]] = []
    changed = 0
    for index, (mine, theirs) in enumerate(zip(found, reference, strict=True)):
        changed += mine.verdict.answer != theirs.verdict.answer
        if mine.verdict.exact != theirs.verdict.exact:
            (gained if mine.verdict.exact else lost).append(_pair(problems[index // samples], mine, theirs))
    return {
        "lost": len(lost), "gained": len(gained), "changed": changed / len(found),
        "examples": [*({"kind": "lost", **one} for one in lost[:SHOWN]),
                     *({"kind": "gained", **one} for one in gained[:SHOWN])],
    }  # fmt: skip


def _pair(problem: Problem, mine: Judged, theirs: Judged) -> dict[str, Any]:
    return {
        "question": problem.prompt[:EXCERPT], "right": problem.answer[:EXCERPT],
        "model": _excerpt(mine), "reference": _excerpt(theirs),
    }  # fmt: skip


def _excerpt(one: Judged) -> dict[str, Any]:
    text = one.attempt.text
    shown = text if len(text) <= EXCERPT else f"[...] {text[-EXCERPT:]}"
    wrong = one.verdict.first_wrong
    return {
        "answer": one.verdict.answer and one.verdict.answer[:EXCERPT], "text": shown, "tokens": one.attempt.tokens,
        "first_wrong_step": None if wrong is None else wrong + 1,
    }  # fmt: skip


def _share(values: Any) -> float:
    return statistics.fmean(map(float, values))

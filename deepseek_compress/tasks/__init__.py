"""The built-in tasks: short reasoning problems in the R1 manner, with a verifier that checks every step.

    prompt  anna has 2 3 apples . then anna buys 9 more . how many apples does anna have now ?
    answer  <think> 2 3 + 9 = 3 2 </think> 3 2

Four families in the shares of `FAMILIES`. A problem's split is decided by a hash of its prompt, so that training,
calibration and test sets are disjoint whatever the seeds are. `selection` are the test problems by which the built-in
model's weights were chosen: they never judge it, so `unseen` leaves them out.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Collection
from functools import cache

from deepseek_compress.errors import DscError
from deepseek_compress.tasks import adversarial, commonsense, mathematics, programs
from deepseek_compress.tasks.problem import Difficulty, Problem, Verdict
from deepseek_compress.tasks.vocabulary import END_THINK, EOS, THINK, write_tokenizer

#: family -> (its module, its share of the mix)
FAMILIES = {
    "mathematics": (mathematics, 0.35),
    "programs": (programs, 0.30),
    "commonsense": (commonsense, 0.25),
    "adversarial": (adversarial, 0.10),
}
SPLITS = ("test", "calibration", "train")
SELECTED = 1000  # problems that training tested on
LONGEST = 110  # words of prompt and solution; longer problems are not given
DEFAULT = Difficulty(largest=999, limit=9999, shortest=3, longest=4)

__all__ = [
    "DEFAULT", "FAMILIES", "SPLITS", "Difficulty", "Problem", "Verdict", "generate", "mixture", "selection",
    "split_of", "unseen", "verify", "write_tokenizer",
]  # fmt: skip


def split_of(prompt: str) -> str:
    """Return the set a prompt belongs to: a tenth `test`, a tenth `calibration`, the rest `train`."""
    bucket = hashlib.blake2b(prompt.encode(), digest_size=4).digest()[3] % 10
    return SPLITS[min(bucket, 2)]


def generate(
    family: str,
    seed: int,
    count: int,
    split: str = "train",
    difficulty: Difficulty = DEFAULT,
    kind: str = "",
    without: Collection[str] = (),
) -> list[Problem]:
    """`count` different problems of one family and split; the same arguments give the same problems.

    `kind` limits them to one sub-task; `without`: prompts that are left out. Raises DscError for an unknown name.
    """
    if family not in FAMILIES or split not in SPLITS:
        raise DscError(
            f"no tasks of family {family!r}, split {split!r}",
            f"families: {', '.join(FAMILIES)}; splits: {', '.join(SPLITS)}",
        )
    rng = random.Random(f"{family}{kind}/{split}/{seed}")
    kinds = FAMILIES[family][0].KINDS
    if kind and kind not in kinds:
        raise DscError(f"no kind {kind!r} in family {family}", f"kinds: {', '.join(kinds)}")
    makers = [kinds[kind]] if kind else list(kinds.values())
    found: dict[str, Problem] = {}
    while len(found) < count:
        problem = rng.choice(makers)(rng, difficulty)
        if split_of(problem.prompt) != split or problem.prompt in without:
            continue
        if len(f"{problem.prompt} {problem.solution}".split()) <= LONGEST:
            found.setdefault(problem.prompt, problem)
    return list(found.values())


def mixture(
    seed: int,
    count: int,
    split: str = "test",
    difficulty: Difficulty = DEFAULT,
    without: Collection[str] = (),
) -> list[Problem]:
    """`count` problems of all families in their shares, shuffled; none whose prompt is in `without`."""
    counts = {family: int(share * count) for family, (_, share) in FAMILIES.items()}
    counts["mathematics"] += count - sum(counts.values())
    problems = [p for family, n in counts.items() for p in generate(family, seed, n, split, difficulty, "", without)]
    random.Random(f"mixture/{split}/{seed}").shuffle(problems)
    return problems


def selection(count: int = SELECTED, difficulty: Difficulty = DEFAULT) -> list[Problem]:
    """Return the problems by which weights are chosen while the built-in model is trained."""
    return mixture(0, count, "test", difficulty)


def unseen(seed: int, count: int) -> list[Problem]:
    """Test problems by which nothing was chosen."""
    return mixture(seed, count, "test", without=_selected())


@cache
def _selected() -> frozenset[str]:
    return frozenset(problem.prompt for problem in selection())


def verify(problem: Problem, completion: str) -> Verdict:
    """Judge a completion, `<think> steps </think> answer`; what follows `<eos>` is not read. Never executes it.

    The answer is right if it equals the reference; a function that passes all unit tests and any correct naming of a
    contradiction are right too. Steps are what stands between the marks, cut at `;`.
    """
    words = completion.split()
    words = words[: words.index(EOS)] if EOS in words else words
    if words[:1] != [THINK] or END_THINK not in words:
        return Verdict(False, 0.0, 0, 0)
    end = words.index(END_THINK)
    answer = words[end + 1 :]
    steps = [step for step in programs.split(words[1:end], ";") if step]
    valid: list[list[str]] = []
    wrong = None
    for number, step in enumerate(steps):
        if _step_holds(problem, step, valid, len(valid)):
            valid.append(step)
        elif wrong is None:
            wrong = number
    right, expected = _right(problem, answer), problem.answer.split()
    midway = not right and any(step[-len(expected) :] == expected for step in valid)
    f1 = token_f1(answer, expected)
    return Verdict(right, f1, len(valid), len(steps), wrong, " ".join(answer) or None, midway)


def token_f1(answer: list[str], reference: list[str]) -> float:
    """Harmonic mean of precision and recall over the words, repeated words counted (as for SQuAD)."""
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference)) if common else 0.0


def _right(problem: Problem, answer: list[str]) -> bool:
    if " ".join(answer) == problem.answer:
        return True
    if "tests" in problem.meta:
        return programs.passes(answer, problem)
    return " ".join(answer) in problem.meta.get("answers", ())


def _step_holds(problem: Problem, step: list[str], valid: list[list[str]], index: int) -> bool:
    if "trace" in problem.meta:
        trace = problem.meta["trace"]
        return bool(index < len(trace) and " ".join(step) == trace[index])
    if problem.kind == "operator":
        return programs.tried(problem, step)
    if problem.family in ("mathematics", "programs"):
        return mathematics.step_holds(problem, step, valid)
    if problem.family == "commonsense":
        return commonsense.step_holds(problem, step, valid)
    return adversarial.step_holds(problem, step, valid)

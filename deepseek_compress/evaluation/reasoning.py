"""The built-in reasoning suite: unseen problems, answered greedily, judged by the tasks' own verifier.

Every model gets the same problems in the same order, as many new tokens as half again the longest reference solution
takes, and no second try. A problem counts by itself: the share of valid steps is its own share, 0 where no chain was
written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.divergence import Sample
from deepseek_compress.tasks import Problem, Verdict, mixture, verify
from deepseek_compress.tasks.vocabulary import THINK

if TYPE_CHECKING:
    from deepseek_compress.models.runtime import Model
    from deepseek_compress.models.tokenizer import Tokenizer

SEED = 0  # of the test problems: the same in every report, so that reports can be compared
BATCH = 256  # problems answered together

#: name -> (what makes `count` problems, one line about it)
SUITES: dict[str, tuple[Callable[[int], list[Problem]], str]] = {
    "builtin": (
        lambda count: mixture(SEED, count, split="test"),
        "mathematics 35 %, programs 30 %, commonsense 25 %, adversarial 10 %; unseen, every step checked",
    ),
}


@dataclass(frozen=True)
class Prompts:
    """Problems as one tokenizer writes them."""

    problems: Sequence[Problem]
    ids: list[list[int]]
    opened: bool  # the prompt ends with <think>, so that the completion begins within the chain
    solutions: list[Sample]  # prompt and reference solution; the solution is predicted
    limit: int  # new tokens a model may write


def load_suite(name: str, count: int) -> list[Problem]:
    """`count` problems of the suite `name`. Raises `DscError` for an unknown name or no problems."""
    if name not in SUITES:
        raise DscError(f"unknown suite {name!r}", f"valid names: {', '.join(SUITES)}")
    if count < 1:
        raise DscError(f"{count} problems", "ask for at least 1")
    return SUITES[name][0](count)


def prepare(problems: Sequence[Problem], tokenizer: Tokenizer) -> Prompts:
    """Tokenise prompts and reference solutions. A chat template is used where the model has one."""
    opened = False
    if tokenizer.has_chat_template:
        texts = [tokenizer.chat([{"role": "user", "content": p.prompt}], answer_next=True) for p in problems]
        opened = texts[0].rstrip().endswith(THINK)
        ids = tokenizer.encode_many(texts)
    else:
        ids = tokenizer.encode_many([problem.prompt for problem in problems], special=True)
    ends = list(tokenizer.eos_ids[:1])
    answers = [problem.solution.removeprefix(THINK) if opened else problem.solution for problem in problems]
    written = [[*found, *ends] for found in tokenizer.encode_many(answers)]
    solutions = [Sample([*prompt, *answer], len(prompt)) for prompt, answer in zip(ids, written, strict=True)]
    return Prompts(problems, ids, opened, solutions, limit=max(map(len, written)) * 3 // 2)


def answer(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Prompts,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Verdict]:
    """The verdict on the model's greedy completion of every prompt, in their order."""
    order = sorted(range(len(prompts.ids)), key=lambda index: len(prompts.ids[index]))
    found: dict[int, Verdict] = {}
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        ends = tokenizer.eos_ids or None
        completions = model.generate([prompts.ids[index] for index in chosen], prompts.limit, ends, batch_size=BATCH)
        for index, ids in zip(chosen, completions, strict=True):
            text = tokenizer.decode(ids, skip_special=False)
            found[index] = verify(prompts.problems[index], f"{THINK} {text}" if prompts.opened else text)
        progress(len(found), len(order))
    return [found[index] for index in range(len(order))]


def step_share(verdict: Verdict) -> float:
    """Valid steps / written steps of one problem, 0 without a chain."""
    return verdict.valid_steps / verdict.written_steps if verdict.written_steps else 0.0

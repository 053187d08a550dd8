"""Questions for a model: the built-in reasoning suite, or files of the user's, and the verdict on each answer.

Every model gets the same problems in the same order, the same number of new tokens (half again what the longest
reference solution takes, unless the recipe says otherwise), and no second try. A problem counts by itself: the share of
valid steps is its own share, 0 where no chain was written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.answering import Answerer, Answers, FromModel, Request
from deepseek_compress.evaluation.divergence import Sample
from deepseek_compress.evaluation.process import Judged, judged
from deepseek_compress.generation.sampling import Sampling
from deepseek_compress.tasks import Problem, Verdict, files, unseen, verify
from deepseek_compress.tasks.vocabulary import THINK

if TYPE_CHECKING:
    from deepseek_compress.models.runtime import Model
    from deepseek_compress.models.tokenizer import Tokenizer

SEED = 0  # of the test problems: the same in every report, so that reports can be compared
BUILTIN = "builtin"
ASKED = 1000  # problems, where nobody says how many
SHORTEST = 256  # new tokens that an answer to a question of the user's may have at least
GREEDY = Sampling()
NEXT = "\nQuestion:"  # a model without chat template that continues so has answered

#: name -> (what makes `count` problems, one line about it)
SUITES: dict[str, tuple[Callable[[int], list[Problem]], str]] = {
    BUILTIN: (
        lambda count: unseen(SEED, count),
        "mathematics 35 %, programs 30 %, commonsense 25 %, adversarial 10 %; unseen, every step checked",
    ),
}


@dataclass(frozen=True)
class Asking:
    """Prompt format of questions: an `instruction` after each, `examples` before, sampled or greedy answers."""

    instruction: str | None = None
    examples: Sequence[Problem] = ()
    max_new_tokens: int | None = None
    sampling: Sampling = GREEDY
    samples: int = 1  # answers to each question
    scorer: str = "numbers"  # or strict, flexible: of answers to files


@dataclass(frozen=True)
class Prompts:
    """Problems as one tokenizer writes them."""

    problems: Sequence[Problem]
    ids: list[list[int]]
    opened: bool  # the prompt ends with <think>, so that the completion begins within the chain
    solutions: list[Sample]  # prompt and reference solution; the solution is predicted
    limit: int  # new tokens a model may write
    asked: Sequence[str | list[dict[str, str]]] = ()  # the same as text or messages, for what has its own tokenizer
    stop: str | None = None  # text at which an answer ends
    asking: Asking = Asking()


def known(name: str) -> bool:
    """Whether `name` is a suite, or looks like a file of questions."""
    return name in SUITES or Path(name).suffix in (".jsonl", ".parquet")


def load_suite(name: str, count: int | None, skip: int = 0) -> list[Problem]:
    """`count` problems of a suite, or of a file after the first `skip`; None: `ASKED` of a suite, all of a file.

    Raises `DscError` for an unknown name, no problems, or fewer than `count` in a file.
    """
    if not known(name):
        what = f"unknown suite {name!r}"
        raise DscError(what, f"valid names: {', '.join(SUITES)}, or a .jsonl or .parquet file of questions")
    if count is not None and count < 1:
        raise DscError(f"{count} problems", "ask for at least 1")
    if name in SUITES:
        return SUITES[name][0](ASKED if count is None else count)
    found = files.read_questions(Path(name).expanduser(), None if count is None else count + skip)
    if len(found) < (count or 1) + skip:
        what = f"{name}: {len(found)} questions, {(count or 1) + skip} are asked for"
        raise DscError(what, "ask for fewer with --problems, or give a longer file")
    return found[skip:]


def prepare(problems: Sequence[Problem], tokenizer: Tokenizer, asking: Asking = Asking()) -> Prompts:
    """Tokenise prompts and reference solutions. A chat template is used where the model has one."""
    opened, stop = False, None
    asked: list[str | list[dict[str, str]]]
    if tokenizer.has_chat_template:
        messages = [_messages(problem, asking) for problem in problems]
        texts = [tokenizer.chat(found, answer_next=True) for found in messages]
        opened = texts[0].rstrip().endswith(THINK)
        ids, asked = tokenizer.encode_many(texts), [*messages]
    else:
        plain = [_plain(problem, asking) for problem in problems]
        ids, asked = tokenizer.encode_many(plain, special=True), [*plain]
        stop = NEXT if any(problem.kind == files.KIND for problem in problems) else None
    ends = list(tokenizer.eos_ids[:1])
    answers = [_reference(problem, opened, stop is not None) for problem in problems]
    written = [[*found, *ends] for found in tokenizer.encode_many(answers)]
    solutions = [Sample([*prompt, *answer], len(prompt)) for prompt, answer in zip(ids, written, strict=True)]
    limit = max(map(len, written)) * 3 // 2
    if any(problem.kind == files.KIND for problem in problems):
        limit = max(limit, SHORTEST)
    return Prompts(problems, ids, opened, solutions, asking.max_new_tokens or limit, asked, stop, asking)


def first(prompts: Prompts, count: int) -> Prompts:
    """Return the first `count` problems."""
    found = replace(prompts, problems=prompts.problems[:count], ids=prompts.ids[:count], asked=prompts.asked[:count])
    return replace(found, solutions=prompts.solutions[:count])


def _messages(problem: Problem, asking: Asking) -> list[dict[str, str]]:
    found = []
    for example in asking.examples:
        found.append({"role": "user", "content": _question(example, asking)})
        found.append({"role": "assistant", "content": example.solution})
    return [*found, {"role": "user", "content": _question(problem, asking)}]


def _plain(problem: Problem, asking: Asking) -> str:
    if problem.kind != files.KIND:
        return problem.prompt
    shown = "".join(f"Question: {_question(e, asking)}\nAnswer: {e.solution}\n\n" for e in asking.examples)
    return f"{shown}Question: {_question(problem, asking)}\nAnswer:"


def _question(problem: Problem, asking: Asking) -> str:
    return problem.prompt if asking.instruction is None else f"{problem.prompt}\n{asking.instruction}"


def _reference(problem: Problem, opened: bool, after_colon: bool) -> str:
    text = problem.solution.removeprefix(THINK) if opened else problem.solution
    return f" {text}" if after_colon else text


def judge(problem: Problem, completion: str, scorer: str = "numbers") -> Verdict:
    """Return the verdict of the task that a problem belongs to."""
    return files.judge(problem, completion, scorer) if problem.kind == files.KIND else verify(problem, completion)


def ask(
    answerer: Answerer,
    tokenizer: Tokenizer,
    prompts: Prompts,
    answers: Answers | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Judged]:
    """Return the judged answers to every prompt, in their order; `samples` neighbours belong to one problem."""
    many, sampling = prompts.asking.samples, prompts.asking.sampling
    requests = [
        Request(ids, prompts.asked[index] if prompts.asked else "", prompts.limit, prompts.stop,
                sampling.model_copy(update={"seed": _seed(sampling.seed, index, sample)}))
        for index, ids in enumerate(prompts.ids)
        for sample in range(many)
    ]  # fmt: skip
    attempts = (answers or Answers(None)).collect(answerer, requests, progress)
    found = []
    for number, attempt in enumerate(attempts):
        text = f"{THINK} {attempt.text}" if prompts.opened and THINK not in attempt.text else attempt.text
        text = text.partition(prompts.stop)[0] if prompts.stop else text
        verdict = judge(prompts.problems[number // many], text, prompts.asking.scorer)
        found.append(judged(attempt._replace(text=text), verdict, lambda some: len(tokenizer.encode(some))))
    return found


def answer(
    model: Model,
    tokenizer: Tokenizer,
    prompts: Prompts,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Verdict]:
    """Return the verdict on the model's greedy completion of every prompt, in their order."""
    prompts = replace(prompts, asking=replace(prompts.asking, sampling=Sampling(), samples=1))
    return [one.verdict for one in ask(FromModel(model, tokenizer), tokenizer, prompts, None, progress)]


def step_share(verdict: Verdict) -> float:
    """Return valid steps / written steps of one problem, 0 without a chain."""
    return verdict.valid_steps / verdict.written_steps if verdict.written_steps else 0.0


def _seed(seed: int, problem: int, sample: int) -> int:
    """Each answer draws from its own stream, whatever shares its batch."""
    return (seed * 1_000_003 + problem) * 1009 + sample

"""The built-in tasks: every reference solution is right by the verifier, and wrong ones are found out."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_compress import tasks
from deepseek_compress.errors import DscError
from deepseek_compress.tasks import programs
from deepseek_compress.tasks.expressions import Malformed, digits, number, value_of
from deepseek_compress.tasks.problem import Problem
from deepseek_compress.tasks.vocabulary import words

MIX = tasks.mixture(3, 600, "test")


def completion(problem: Problem, steps: list[str] | None = None, answer: str | None = None) -> str:
    chain = " ; ".join(problem.steps if steps is None else steps)
    return f"<think> {chain} </think> {problem.answer if answer is None else answer} <eos>"


def of_kind(kind: str) -> Problem:
    return next(problem for problem in MIX if problem.kind == kind)


def test_every_reference_solution_is_right_step_by_step() -> None:
    for problem in MIX:
        verdict = tasks.verify(problem, completion(problem))
        assert verdict[:5] == (True, 1.0, len(problem.steps), len(problem.steps), None), problem
        assert 1 <= len(problem.steps) <= 5


def test_every_kind_is_drawn_and_families_have_their_shares() -> None:
    kinds = {kind for module, _ in tasks.FAMILIES.values() for kind in module.KINDS}
    assert {problem.kind for problem in MIX} == kinds
    counts = {family: sum(problem.family == family for problem in MIX) for family in tasks.FAMILIES}
    assert counts == {"mathematics": 210, "programs": 180, "commonsense": 150, "adversarial": 60}


def test_words_are_in_the_vocabulary_and_problems_short() -> None:
    known = set(words())
    assert len(words()) == len(known) == 512
    for problem in MIX:
        text = f"{problem.prompt} {problem.solution}".split()
        assert set(text) <= known and len(text) <= tasks.LONGEST


def test_same_seed_same_problems_and_splits_never_share_a_prompt() -> None:
    assert tasks.mixture(3, 600, "test") == MIX
    prompts = {split: {p.prompt for p in tasks.mixture(3, 400, split)} for split in tasks.SPLITS}
    for split, found in prompts.items():
        assert all(tasks.split_of(prompt) == split for prompt in found)
    assert not prompts["test"] & prompts["train"] and not prompts["test"] & prompts["calibration"]


def test_one_changed_digit_makes_the_step_invalid_and_the_answer_wrong() -> None:
    problem = of_kind("commands")
    wrong = re.sub(r"\d$", lambda match: str((int(match[0]) + 1) % 10), problem.steps[-1])
    answer = re.sub(r"\d$", lambda match: str((int(match[0]) + 1) % 10), problem.answer)
    verdict = tasks.verify(problem, completion(problem, [*problem.steps[:-1], wrong], answer))
    assert not verdict.exact and verdict.valid_steps == len(problem.steps) - 1 == verdict.written_steps - 1
    assert 0 < verdict.f1 < 1 or len(problem.answer.split()) == 1


def test_a_true_equation_with_numbers_from_nowhere_does_not_count() -> None:
    problem = of_kind("equation")
    verdict = tasks.verify(problem, completion(problem, ["3 1 4 + 1 5 9 = 4 7 3", *problem.steps]))
    assert verdict.exact and verdict.valid_steps == verdict.written_steps - 1


@pytest.mark.parametrize("text", ["", "5", "<think> 1 + 1 = 2", "</think> 5", "<eos> <think> x </think> 5"])
def test_no_chain_no_answer(text: str) -> None:
    assert tasks.verify(MIX[0], text) == tasks.Verdict(False, 0.0, 0, 0)


def test_a_function_is_judged_by_its_unit_tests_shown_and_hidden() -> None:
    problem = of_kind("linear")
    head, expression = "f ( x ) =", problem.answer.removeprefix("f ( x ) = ")
    factor, constant = expression.removeprefix("x * ").split(" + ")
    assert tasks.verify(problem, completion(problem, answer=f"{head} {constant} + {factor} * x")).exact
    assert tasks.verify(problem, completion(problem, answer=f"{head} ( x + 0 ) * {factor} + {constant}")).exact
    (x, y), _ = problem.meta["tests"]
    assert not tasks.verify(problem, completion(problem, answer=f"{head} x + {digits(y - x)}")).exact
    assert not tasks.verify(problem, completion(problem, answer=f"{head} __import__")).exact
    assert not tasks.verify(problem, completion(problem, answer=expression)).exact


def test_any_statement_on_the_cycle_names_the_contradiction_and_nothing_else_does() -> None:
    problem = of_kind("cycle")
    for step in problem.steps:
        assert tasks.verify(problem, completion(problem, answer=f"contradiction {step}")).exact
    assert not tasks.verify(problem, completion(problem, answer=problem.steps[0].split()[0])).exact


def test_programs_do_what_they_say() -> None:
    text = "a = 7 ; b = a * 3 ; if b > 2 0 : a = b - 1 else a = 0 ; repeat 2 : a = a + b ; a = a"
    assert programs.trace(text.split()) == [
        "a = 7", "b = 7 * 3 = 2 1", "2 1 > 2 0 yes", "a = 2 1 - 1 = 2 0", "a = 2 0 + 2 1 = 4 1", "a = 4 1 + 2 1 = 6 2",
        "a = 6 2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text",
    [
        "", "1 +", "( 1", "1 )", "0 7", "7 / 2", "7 / 0", "x", "print 1", "1 2 3 4 5 6 7", "9 9 9 9 9 * 9 9 9 9 9",
        "1 " * 65,
    ],
)  # fmt: skip
def test_expressions_that_are_not_defined_are_refused(text: str) -> None:
    with pytest.raises(Malformed):
        value_of(text.split())


@given(st.integers(0, 99), st.lists(st.tuples(st.sampled_from("+-*"), st.integers(0, 9)), max_size=3))
def test_expressions_have_the_value_of_python_arithmetic(first: int, parts: list[tuple[str, int]]) -> None:
    python = f"{first}" + "".join(f"{operator}{value}" for operator, value in parts)
    ours = digits(first) + "".join(f" {operator} {digits(value)}" for operator, value in parts)
    assert value_of(ours.split()) == eval(python)


@given(st.integers(0, 999_999))
def test_numbers_are_written_digit_by_digit(value: int) -> None:
    assert number(digits(value).split()) == value


def test_unknown_names_are_refused_with_the_valid_ones() -> None:
    with pytest.raises(DscError, match="families: mathematics, programs, commonsense, adversarial"):
        tasks.generate("poetry", 0, 1)
    with pytest.raises(DscError, match="splits: test, calibration, train"):
        tasks.generate("programs", 0, 1, "dev")
    with pytest.raises(DscError, match="straight, branch, loop, linear, operator"):
        tasks.generate("programs", 0, 1, kind="cobol")

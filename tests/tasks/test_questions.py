"""Questions of the user's: arithmetic steps, final answers, files, and every way in which a file may be wrong."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepseek_compress.errors import DscError
from deepseek_compress.tasks import answers, arithmetic, files
from deepseek_compress.tasks.expressions import Malformed

LINE = {"question": "Two and two?", "answer": "2 + 2 = <<2+2=4>>4\n#### 4"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("48/2", 24), ("1,000 * .5", 500), ("(2 + 3) * -4", -20), ("20%", Fraction(1, 5)),
        ("2 × 3 ÷ 4", Fraction(3, 2)),
        ("$12/60", Fraction(1, 5)), ("3 x 4", 12), ("+5 - 2 - 1", 2), ("100*(1-10%)", 90), ("8/2/2", 2),
    ],
)  # fmt: skip
def test_values_are_exact(text: str, value: Fraction) -> None:
    assert arithmetic.value_of(text) == value


@pytest.mark.parametrize(
    "text", ["", "1 +", "(1", "1)", "2 ** 9", "1/0", "a + 1", "1 2", "9" * 300, "__import__('os')"]
)
def test_what_is_no_expression(text: str) -> None:
    with pytest.raises(Malformed):
        arithmetic.value_of(text)


@given(st.integers(-999, 999), st.integers(-999, 999), st.integers(1, 99))
def test_values_agree_with_fractions(a: int, b: int, c: int) -> None:
    assert arithmetic.value_of(f"{a} - ({b}) / {c} * 2") == a - Fraction(b, c) * 2


@pytest.mark.parametrize(
    ("expression", "value", "good"),
    [
        ("48/2", "24", True), ("48/2", "25", False), ("1/3", "0.33", True), ("2/3", "0.66", True),
        ("2/3", "0.67", True),
        ("2/3", "0.7", True), ("2/3", "0.68", False), ("7/2", "3", False), ("1/8", "12.5%", True), ("x", "1", False),
    ],
)  # fmt: skip
def test_steps_hold_up_to_the_decimals_that_were_written(expression: str, value: str, good: bool) -> None:
    assert arithmetic.holds(expression, value) is good


def test_steps_are_annotations_else_equations() -> None:
    assert arithmetic.equations("He has 3 x 4 = <<3*4=12>>12, 1 + 1 = 3") == [("3*4", "12")]
    assert arithmetic.equations("3 x 4 = 12, then $12 + 5 = $17.") == [("3 * 4", "12"), ("12 + 5", "17")]
    assert arithmetic.equations("1 - 1/4 = 3/4 and 1 + 1 = 2 + 0") == [("1 - 1/4", "3/4")]
    for text in ("(" * 20000, "1-" * 10000, "1--" * 10000, "1,3 x " * 9000):
        arithmetic.equations(text)  # in time


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so 5\n#### 1,234", "1,234"), (r"thus \boxed{\frac{3}{4}}.", r"\frac{3}{4}"), ("The answer is 42.", "42"),
        ("<think> 3, no 4 </think> It is 7 apples", "7"), ("<think> 3, no 4", None), ("I get 3 and then 9", "9"),
        (r"\boxed{1} or \boxed{2", "1"), ("", None), ("The answer is blue.", "blue"),
    ],
)  # fmt: skip
def test_the_final_answer(text: str, answer: str | None) -> None:
    assert answers.final_answer(text) == answer


@pytest.mark.parametrize(
    ("mine", "theirs", "same"),
    [
        ("1,000.0", "1000", True), ("$72.", "72", True), (r"\frac{3}{4}", "0.75", True), ("3/4", ".75", True),
        ("72", "73", False), ("Blue", "blue", True), ("50%", "0.5", True), ("10", "1", False), ("x^2", "x^2", True),
    ],
)  # fmt: skip
def test_numbers_are_compared_as_numbers(mine: str, theirs: str, same: bool) -> None:
    assert answers.equal(mine, theirs) is same


def test_choices_are_letters_or_words() -> None:
    problem = files.problem_of("here", {"question": "Sky?", "choices": ["red", "blue", "green"], "answer": 1}, "f")
    assert (problem.answer, problem.prompt) == ("B", "Sky?\n\nA. red\nB. blue\nC. green")
    right = ["B", "(B)", "The answer is B.", "blue", "I think it is blue", "<think> A? </think> B", r"\boxed{B}"]
    assert [files.judge(problem, text).exact for text in right] == [True] * len(right)
    wrong = ["A", "C. green", "I would not say", "red or blue or green", "<think> B"]
    assert [files.judge(problem, text).exact for text in wrong] == [False] * len(wrong)


def test_a_verdict_says_what_went_wrong_and_where() -> None:
    problem = files.problem_of("here", LINE, "f")
    good = files.judge(problem, problem.solution)
    assert good == (True, 1.0, 1, 1, None, "4", False)
    bad = files.judge(problem, "2 + 2 = 4, so 4 + 1 = 6 and 6 - 1 = 5\n#### 5")
    assert (bad.exact, bad.valid_steps, bad.written_steps, bad.first_wrong, bad.midway) == (False, 2, 3, 1, True)
    assert not files.judge(problem, "1 + 2 = 3\n#### 3").midway


def test_files_are_read_in_order(tmp_path: Path) -> None:
    lines = [{**LINE, "id": 3}, {"problem": "One?", "solution": r"\boxed{1}"}, {"prompt": "Pi?", "target": 3.14}]
    file = tmp_path / "some.jsonl"
    file.write_text("\ufeff" + "\n\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    found = files.read_questions(file)
    assert [(p.family, p.prompt, p.answer) for p in found] == [
        ("some", "Two and two?", "4"), ("some", "One?", "1"), ("some", "Pi?", "3.14")
    ]  # fmt: skip
    assert found[0].solution == LINE["answer"]
    assert len(files.read_questions(file, 2)) == 2
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    pq.write_table(pyarrow.Table.from_pylist([LINE, LINE]), tmp_path / "some.parquet")
    assert [p.answer for p in files.read_questions(tmp_path / "some.parquet")] == ["4", "4"]


BAD = {
    "empty": (b"", "no questions in it"),
    "blank": (b"\n \n", "no questions in it"),
    "not JSON": (b"{", r":1: not valid JSON"),
    "deep": (b"[" * 100_000, r":1: not valid JSON"),
    "a list": (b"[1]", "not a JSON object"),
    "keys": (b'{"text": "a"}', "found the keys 'text'"),
    "no answer": (b'{"question": "a"}', "found the keys 'question'"),
    "null": (b'{"question": "a", "answer": null}', "found the keys"),
    "an object": (b'{"question": "a", "answer": {"x": 1}}', "found the keys"),
    "empty answer": (b'{"question": "a", "answer": " "}', "the answer is empty"),
    "empty question": (b'{"question": " ", "answer": "1"}', "found the keys"),
    "bytes": (b'{"question": "\xff", "answer": "1"}', "not UTF-8 text"),
    "surrogate": (b'{"question": "\\ud800", "answer": "1"}', "unpaired UTF-16 surrogate"),
    "one choice": (b'{"question": "a", "choices": ["x"], "answer": "A"}', "choices must be 2 to 10 texts"),
    "choices": (b'{"question": "a", "choices": [1, 2], "answer": "A"}', "choices must be 2 to 10 texts"),
    "no such choice": (b'{"question": "a", "choices": ["x", "y"], "answer": "C"}', "'C' is not one of the choices"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_wrong_is_one_line_with_its_place(kind: str, tmp_path: Path) -> None:
    content, message = BAD[kind]
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(DscError, match=message) as caught:
        files.read_questions(file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_malformed_lines_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text("\n".join(["{", json.dumps(LINE), '{"a": 1}']))
    with pytest.raises(DscError) as caught:
        files.read_questions(file)
    assert [place in str(caught.value) for place in ("bad.jsonl:1:", "bad.jsonl:2:", "bad.jsonl:3:")] == [
        True,
        False,
        True,
    ]
    with pytest.raises(DscError, match="no such file"):
        files.read_questions(tmp_path / "none.jsonl")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DscError, match=r"give a Parquet file|pyarrow"):
        files.read_questions(tmp_path / "bad.parquet")

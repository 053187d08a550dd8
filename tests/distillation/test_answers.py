"""Final answers and the arithmetic of solutions."""

from __future__ import annotations

from fractions import Fraction

import pytest

from deepseek_compress.distillation.answers import answer_of, equations, final_answer, number, same


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("He has 5.\n#### 72", "72"),
        ("#### 1\nno\n#### 1,234 ", "1,234"),
        (r"so \boxed{\frac{3}{4}} it is", r"\frac{3}{4}"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{never closed", None),
        ("nothing", None),
    ],
)
def test_marked_answers(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


def test_an_unmarked_completion_is_taken_at_its_last_number_after_the_chain() -> None:
    assert answer_of("<think> 1 + 1 = 2 </think> There are 3 apples, 4 pears.") == "4"
    assert answer_of("<think> 7 </think> yes") == "yes"
    assert answer_of("first 3\n#### 5 apples") == "5 apples"


@pytest.mark.parametrize(
    ("first", "second"),
    [("1,234.50", "1234.5"), ("$72", "72"), ("72 clips", "72.0"), (r"\frac{3}{4}", "0.75"), ("3/4", r"\dfrac{6}{8}"),
     ("-2", "-2.0"), (r"\(5\)", "5"), ("Yes.", "yes"), ("  a  b", "A b"), (".5", "0.5"), ("-1/2", "-0.5")],
)  # fmt: skip
def test_numbers_are_compared_as_numbers(first: str, second: str) -> None:
    assert same(first, second)
    assert same(second, first)


@pytest.mark.parametrize(
    ("first", "second"), [("72", "73"), ("1/0", "1"), ("yes", "no"), ("2", "-2"), ("", "0"), ("3 2 0", "3")]
)
def test_other_answers_differ(first: str, second: str) -> None:
    assert not same(first, second)


def test_a_number_of_any_length_takes_no_time() -> None:
    assert number("9" * 10**6) == Fraction(int("9" * 40))
    assert number("1e999999999") is None
    assert equations("1 " + "+ 1 " * 10**5 + "= 2")[1] <= 1


def test_equations_hold_to_the_digits_written() -> None:
    text = "48/2 = <<48/2=24>>24 clips. 10 / 3 = 3.33, 10/3=3.4. (2 + 3) x 4 = 20 and $1,000 - 1 = 999. x = 5. 1/0 = 7"
    assert equations(text) == (4, 6)
    assert equations("2 + 2 = 4 = 4 and 3 * 3 = 3 + 6 = 9") == (3, 3)
    assert equations("no numbers") == (0, 0)
    assert equations("2 + (3 = 5") == (0, 1)

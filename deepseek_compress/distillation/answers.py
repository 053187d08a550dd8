"""Read the final answer of a solution, and check the arithmetic it writes down; nothing is ever executed.

A final answer stands after `####` (GSM8K) or in the last `\\boxed{...}` (MATH); a completion that has neither is taken
at its last number. Numbers are compared as numbers: `1,234.50`, `$1234.5`, `\\frac{2469}{2}`, `1234.5 dollars` are one
and the same. A step is an equation between numbers, `48 / 2 = 24`; it holds where both sides agree to the digits
written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise

LONGEST = 40  # characters of a number or of a side of an equation that are looked at, so that none takes long
_MARK = re.compile(r"####[ \t]*([^\n]*)")
_NUMBER = re.compile(r"[-+]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|[-+]?\$?\.\d+")
_FRACTION = re.compile(r"([-+]?)\s*(?:\\[dt]?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+))")
_TOKEN = re.compile(
    r"(?P<skip><<[^<>\n]*>>|[$%]|[ \t]+)|(?P<bullet>(?:(?<=\n)|\A)[ \t]*[-*][ \t])"
    r"|(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:\.\d+)?|\.\d+)|(?P<sign>[-+*/()=×÷]|x(?![a-z]))|(?P<other>.|\n)"
)
_TIMES = {"x": "*", "×": "*", "÷": "/"}
SIDE = 40  # tokens of a side of an equation; a longer one counts as wrong


def final_answer(text: str) -> str | None:
    """Return what `text` gives as its answer by a mark; None where it has no mark."""
    boxed = _last_boxed(text)
    marks = _MARK.findall(text)
    return boxed if boxed is not None else marks[-1].strip() if marks else None


def answer_of(completion: str) -> str:
    """Return the answer of a model's completion: marked, else its last number, else what follows its chain of
    thought."""
    marked = final_answer(completion)
    if marked is not None:
        return marked
    said = concluded(completion)
    numbers = _NUMBER.findall(said)
    return numbers[-1] if numbers else said


def concluded(text: str) -> str:
    """Return what follows the chain of thought."""
    return text.rpartition("</think>")[2].strip()


def same(first: str, second: str) -> bool:
    """Whether two answers agree: as numbers where both begin with one, else as text, spaces and case aside."""
    a, b = number(first), number(second)
    if a is not None and b is not None:
        return a == b
    return _plain(first) == _plain(second)


def number(text: str) -> Fraction | None:
    """Return the number that `text` begins with, units behind it aside; None where there is none."""
    head = text.strip().strip("*` ").removeprefix("\\(").removeprefix("$").strip()[:LONGEST]
    found = _FRACTION.match(head)
    if found:
        sign, top, bottom = found[1], found[2] or found[4], found[3] or found[5]
        value = Fraction(int(top), int(bottom)) if int(bottom) else None
        return value if value is None or sign != "-" else -value
    plain = _NUMBER.match(head)
    if plain is None or re.search(r"\d", head[plain.end() :]):  # `3 of 4` is more than a number
        return None
    return Fraction(Decimal(plain[0].replace(",", "").replace("$", "")))


def equations(text: str) -> tuple[int, int]:
    """(how many equations between numbers hold, how many `text` writes)."""
    valid = written = 0
    for run in _runs(text):
        sides = _split(run)
        for left, right in pairwise(sides):
            if any(token in _SIGNS for token in left[1:-1]):  # a calculation, not the value of a letter
                written += 1
                valid += _agree(left, right)
    return valid, written


def _runs(text: str) -> Iterator[list[str]]:
    """Numbers and signs that stand together; words, ends of lines and of sentences part them, and so do two numbers."""
    run: list[str] = []
    for found in _TOKEN.finditer(text):
        kind, token = found.lastgroup, found[0]
        if kind == "skip":
            continue
        after_number = bool(run) and run[-1] not in _SIGNS and run[-1] not in "(="
        if kind in ("other", "bullet") or (kind == "number" and after_number):
            if "=" in run:
                yield run
            run = []
        if kind in ("number", "sign"):
            run.append(_TIMES.get(token, token.replace(",", "")))
    if "=" in run:
        yield run


_SIGNS = frozenset("+-*/")


def _split(run: list[str]) -> list[list[str]]:
    """Return the sides of an equation; a sign at the end of one belongs to what follows, a dash for instance."""
    sides: list[list[str]] = [[]]
    for token in run:
        sides.append([]) if token == "=" else sides[-1].append(token)
    for side in sides:
        while side and side[-1] in _SIGNS:
            side.pop()
    return [side for side in sides if side]


def _agree(left: list[str], right: list[str]) -> bool:
    try:
        a, b = _value(left), _value(right)
    except (ValueError, ZeroDivisionError):
        return False
    digits = right[0].partition(".")[2] if len(right) == 1 else ""
    return abs(a - b) <= (Fraction(1, 2 * 10 ** len(digits)) if digits else 0)


def _value(side: list[str]) -> Fraction:
    """Return a calculation with + - * / and parentheses. Raises ValueError for what is none."""
    if len(side) > SIDE or any(len(token) > LONGEST for token in side):
        raise ValueError("too long")
    value, rest = _sum(side)
    if rest:
        raise ValueError(rest[0])
    return value


def _sum(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, tokens = _product(tokens)
    while tokens and tokens[0] in "+-":
        sign = tokens[0]
        other, tokens = _product(tokens[1:])
        value = value + other if sign == "+" else value - other
    return value, tokens


def _product(tokens: list[str]) -> tuple[Fraction, list[str]]:
    value, tokens = _factor(tokens)
    while tokens and tokens[0] in "*/":
        sign = tokens[0]
        other, tokens = _factor(tokens[1:])
        value = value * other if sign == "*" else value / other
    return value, tokens


def _factor(tokens: list[str]) -> tuple[Fraction, list[str]]:
    if not tokens:
        raise ValueError("ends early")
    first, rest = tokens[0], tokens[1:]
    if first == "-":
        value, rest = _factor(rest)
        return -value, rest
    if first == "(":
        value, rest = _sum(rest)
        if rest[:1] != [")"]:
            raise ValueError("not closed")
        return value, rest[1:]
    if first in "+*/)":
        raise ValueError(first)
    return Fraction(Decimal(first)), rest


def _plain(text: str) -> str:
    return " ".join(text.strip().strip(".").casefold().split())


def _last_boxed(text: str) -> str | None:
    """Return the content of the last `\\boxed{...}` whose braces close."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    begin, depth = start + len("\\boxed{"), 1
    for place in range(begin, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[begin:place].strip()
    return None

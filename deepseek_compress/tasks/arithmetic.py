"""Arithmetic as people and models write it, `1,000 * .5`, `20%`, `3 × 4`: exact fractions, and nothing is executed.

    sum     := product (("+" | "-") product)*
    product := factor (("*" | "/") factor)*
    factor  := ("-" | "+")? (number "%"? | "(" sum ")" "%"?)

A step `expression = value` holds where both sides are equal, or where the value is the expression's rounded or cut to
the decimals that were written (at least one), as in `1 / 3 = 0.33`. Powers are left out: their value is unbounded.
"""

from __future__ import annotations

import re
from fractions import Fraction

from deepseek_compress.tasks.expressions import Malformed

LONGEST = 200  # characters of an expression: bounds the depth and the digits of what is computed
NUMBER = r"(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)"
_TOKEN = re.compile(rf"\s*(?:({NUMBER})|([-+*/()%]))")
_WRITTEN = {"×": "*", "÷": "/", "·": "*", "−": "-", "–": "-", "\\times": "*", "\\cdot": "*", "\\div": "/", "$": ""}
_PLAIN = re.compile(r"(?<=\d)\s*x\s*(?=[\d(.$])")  # "3 x 4": a letter only between numbers
_ANNOTATED = re.compile(r"<<([^<>=]{1,200})=([^<>=]{1,60})>>")
_SIDE = rf"[-(]{{0,4}}{NUMBER}%?\){{0,4}}"
_EQUATION = re.compile(
    rf"(?<![\w.,)/*+-])({_SIDE}(?:\s*[-+*/]\s*{_SIDE}){{1,12}})\s*=\s*(-?{NUMBER}%?(?:/\d+)?)(?![\d/]|\s*[-+*/]|\s\d)"
)


def value_of(text: str) -> Fraction:
    """Return the exact value of an expression. Raises `Malformed` for anything else, and for a division by zero."""
    if len(text) > LONGEST:
        raise Malformed(f"{len(text)} characters, at most {LONGEST}")
    tokens = _tokens(plain(text))
    value, end = _sum(tokens, 0)
    if end < len(tokens):
        raise Malformed(f"unexpected {tokens[end]!r}")
    return value


def plain(text: str) -> str:
    """Return the same text with one spelling of each operator, and without dollar signs."""
    for written, meant in _WRITTEN.items():
        text = text.replace(written, meant)
    return _PLAIN.sub(" * ", text)


def number(text: str) -> Fraction | None:
    """Return the value of a number as it is written, `$1,000.50`, `-3`, `25%`, `3/4`; None for other text."""
    try:
        return value_of(text.strip().rstrip("."))
    except Malformed:
        return None


def equations(text: str) -> list[tuple[str, str]]:
    """(expression, value) of each step: what stands in `<<...>>`, or where nothing does, each `a + b = c`."""
    found = _ANNOTATED.findall(text)
    return found or _EQUATION.findall(plain(text))


def holds(expression: str, value: str) -> bool:
    """Whether a step is true."""
    try:
        exact, written = value_of(expression), value_of(value)
    except Malformed:
        return False
    if exact == written:
        return True
    decimals = len(value.strip().rstrip("%").partition(".")[2])
    if not decimals:
        return False
    unit = Fraction(1, 10**decimals * (100 if value.strip().endswith("%") else 1))
    return abs(exact - written) * 2 <= unit or (0 <= exact - written < unit)


def _tokens(text: str) -> list[str]:
    found, at, text = [], 0, text.rstrip()
    while at < len(text):
        match = _TOKEN.match(text, at)
        if not match:
            raise Malformed(f"unexpected {text[at:].strip()[:10]!r}")
        found.append((match[1] or match[2]).replace(",", ""))
        at = match.end()
    return found


def _sum(tokens: list[str], at: int) -> tuple[Fraction, int]:
    """Return the value of what begins at `at`, and where it ends."""
    value, end = _product(tokens, at)
    while end < len(tokens) and tokens[end] in "+-":
        right, after = _product(tokens, end + 1)
        value, end = (value + right if tokens[end] == "+" else value - right), after
    return value, end


def _product(tokens: list[str], at: int) -> tuple[Fraction, int]:
    value, end = _factor(tokens, at)
    while end < len(tokens) and tokens[end] in "*/":
        right, after = _factor(tokens, end + 1)
        if tokens[end] == "/" and not right:
            raise Malformed("division by zero")
        value, end = (value * right if tokens[end] == "*" else value / right), after
    return value, end


def _factor(tokens: list[str], at: int) -> tuple[Fraction, int]:
    if at >= len(tokens):
        raise Malformed("expression ends too early")
    if tokens[at] in "+-":
        value, end = _factor(tokens, at + 1)
        return (value if tokens[at] == "+" else -value), end
    if tokens[at] == "(":
        value, closed = _sum(tokens, at + 1)
        if closed == len(tokens) or tokens[closed] != ")":
            raise Malformed("missing )")
        end = closed + 1
    elif tokens[at][0] in "0123456789.":
        value, end = Fraction(tokens[at]), at + 1
    else:
        raise Malformed(f"unexpected {tokens[at]!r}")
    percent = end < len(tokens) and tokens[end] == "%"
    return (value / 100, end + 1) if percent else (value, end)

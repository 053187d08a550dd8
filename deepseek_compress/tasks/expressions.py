"""A restricted evaluator: words to a small syntax tree, the tree to an integer. Nothing is ever executed.

    sum     := product (("+" | "-") product)*
    product := atom (("*" | "/" | "max" | "min") atom)*
    atom    := number | variable | "(" sum ")"

A number is a run of digit words; a variable is one letter. Values are integers with |value| below 10**6; a
division must come out even. Everything else raises `Malformed`, so a model's output can do no harm: the depth of the
tree is bounded by its length, and its length by `LONGEST`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

SUM = ("+", "-")
PRODUCT = ("*", "/", "max", "min")
LONGEST = 64  # words
LARGEST = 10**6


class Malformed(ValueError):
    """The words are not an expression, or its value is not defined."""


@dataclass(frozen=True)
class Number:
    """An integer."""

    value: int


@dataclass(frozen=True)
class Variable:
    """A letter with a value."""

    name: str


@dataclass(frozen=True)
class Operation:
    """Two operands and what is done with them."""

    operator: str  # + - * / max min
    left: Node
    right: Node


Node = Number | Variable | Operation


def digits(value: int) -> str:
    """47 -> "4 7"; the value must not be negative."""
    return " ".join(str(value))


def number(words: Sequence[str]) -> int:
    """["4", "7"] -> 47; anything else, and leading zeros, raise `Malformed`."""
    text = "".join(words)
    if not words or any(len(word) != 1 or word not in "0123456789" for word in words) or len(text) > 6:
        raise Malformed(f"not a number: {' '.join(words)}")
    if text[0] == "0" and len(text) > 1:
        raise Malformed(f"leading zero: {' '.join(words)}")
    return int(text)


def parse(words: Sequence[str]) -> Node:
    """Return the syntax tree of an expression; raises `Malformed`."""
    if len(words) > LONGEST:
        raise Malformed(f"{len(words)} words, at most {LONGEST}")
    tree, end = _chain(words, 0, SUM)
    if end != len(words):
        raise Malformed(f"unexpected {words[end]!r}")
    return tree


def evaluate(tree: Node, variables: Mapping[str, int] | None = None) -> int:
    """Return the value of a tree; raises `Malformed` for an unknown variable, an uneven division or a huge value."""
    if isinstance(tree, Number):
        return tree.value
    if isinstance(tree, Variable):
        if variables is None or tree.name not in variables:
            raise Malformed(f"unknown variable {tree.name}")
        return variables[tree.name]
    value = _apply(tree.operator, evaluate(tree.left, variables), evaluate(tree.right, variables))
    if abs(value) >= LARGEST:
        raise Malformed(f"{value} is too large")
    return value


def value_of(words: Sequence[str], variables: Mapping[str, int] | None = None) -> int:
    """`evaluate(parse(words))`."""
    return evaluate(parse(words), variables)


def numbers(tree: Node) -> list[int]:
    """Every number written in the tree, left to right."""
    if isinstance(tree, Operation):
        return numbers(tree.left) + numbers(tree.right)
    return [tree.value] if isinstance(tree, Number) else []


def _apply(operator: str, left: int, right: int) -> int:
    if operator == "/":
        if right == 0 or left % right:
            raise Malformed(f"{left} / {right} is not whole")
        return left // right
    return {"+": left + right, "-": left - right, "*": left * right, "max": max(left, right), "min": min(left, right)}[
        operator
    ]


def _chain(words: Sequence[str], at: int, operators: tuple[str, ...]) -> tuple[Node, int]:
    def operand(position: int) -> tuple[Node, int]:
        return _atom(words, position) if operators == PRODUCT else _chain(words, position, PRODUCT)

    tree, at = operand(at)
    while at < len(words) and words[at] in operators:
        right, end = operand(at + 1)
        tree, at = Operation(words[at], tree, right), end
    return tree, at


def _atom(words: Sequence[str], at: int) -> tuple[Node, int]:
    if at >= len(words):
        raise Malformed("expression ends too early")
    word = words[at]
    if word == "(":
        tree, end = _chain(words, at + 1, SUM)
        if end >= len(words) or words[end] != ")":
            raise Malformed("missing )")
        return tree, end + 1
    if word.isdigit():
        end = at
        while end < len(words) and words[end].isdigit():
            end += 1
        return Number(number(words[at:end])), end
    if len(word) == 1 and word.isalpha():
        return Variable(word), at + 1
    raise Malformed(f"unexpected {word!r}")

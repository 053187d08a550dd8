"""Mathematics: chains of whole-number arithmetic, plain, as stories, and as equations.

A step is `expression = value`. It holds if the equation is true and every number in the expression was given in the
prompt or is the value of an earlier step.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from deepseek_compress.tasks import vocabulary as words
from deepseek_compress.tasks.expressions import Malformed, digits, evaluate, number, numbers, parse
from deepseek_compress.tasks.problem import Difficulty, Problem

ORDERS = {"+": "add {}", "-": "subtract {}", "*": "multiply by {}"}
GAIN = ("{name} buys {n} more", "{name} finds {n} more", "{name} gets {n} more", "{other} gives {name} {n} more")
LOSE = ("{name} sells {n}", "{name} eats {n}", "{name} loses {n}", "{name} gives {other} {n}")


def equal(left: str, value: int) -> str:
    """Return the step that states `left = value`."""
    return f"{left} = {digits(value)}"


def operate(rng: random.Random, value: int, difficulty: Difficulty, operators: str = "+-*") -> tuple[str, int, int]:
    """Return a random operator and operand that keep `value` between 1 and the limit: (operator, operand, result)."""
    while True:
        operator = rng.choice(operators)
        operand = rng.randint(2, 9) if operator == "*" else rng.randint(2, difficulty.largest)
        result = {"+": value + operand, "-": value - operand, "*": value * operand}[operator]
        if 1 <= result <= difficulty.limit:
            return operator, operand, result


def commands(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Start with a number, then add, subtract, multiply."""
    value = rng.randint(2, difficulty.largest)
    parts, steps = [f"start with {digits(value)}"], []
    for _ in range(rng.randint(difficulty.shortest, difficulty.longest)):
        operator, operand, result = operate(rng, value, difficulty)
        parts.append(("then " if rng.random() < 0.3 else "") + ORDERS[operator].format(digits(operand)))
        steps.append(equal(f"{digits(value)} {operator} {digits(operand)}", result))
        value = result
    return _problem("commands", f"{' . '.join(parts)} . what is the result ?", steps, digits(value))


def story(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Somebody has things, gains some and loses some."""
    name, other = rng.sample(words.NAMES, 2)
    item = rng.choice(words.ITEMS)
    value = rng.randint(2, difficulty.largest)
    parts, steps = [f"{name} has {digits(value)} {item}"], []
    for _ in range(rng.randint(difficulty.shortest, min(difficulty.longest, 3))):
        operator, operand, result = operate(rng, value, difficulty, "+-")
        event = rng.choice(GAIN if operator == "+" else LOSE)
        parts.append("then " + event.format(name=name, other=other, n=digits(operand)))
        steps.append(equal(f"{digits(value)} {operator} {digits(operand)}", result))
        value = result
    return _problem("story", f"{' . '.join(parts)} . how many {item} does {name} have now ?", steps, digits(value))


def groups(rng: random.Random, difficulty: Difficulty) -> Problem:
    """So many containers with so many things each, then gains and losses."""
    name, other = rng.sample(words.NAMES, 2)
    item, container = rng.choice(words.ITEMS), rng.choice(words.CONTAINERS)
    while True:
        count, each = rng.randint(2, 9), rng.randint(2, difficulty.largest)
        if count * each <= difficulty.limit:
            break
    value = count * each
    parts = [f"{name} has {digits(count)} {container} with {digits(each)} {item} in each {container}"]
    steps = [equal(f"{digits(count)} * {digits(each)}", value)]
    for _ in range(rng.randint(difficulty.shortest - 1, min(difficulty.longest - 1, 2))):
        operator, operand, result = operate(rng, value, difficulty, "+-")
        event = rng.choice(GAIN if operator == "+" else LOSE)
        parts.append("then " + event.format(name=name, other=other, n=digits(operand)))
        steps.append(equal(f"{digits(value)} {operator} {digits(operand)}", result))
        value = result
    return _problem("groups", f"{' . '.join(parts)} . how many {item} does {name} have now ?", steps, digits(value))


def equation(rng: random.Random, difficulty: Difficulty) -> Problem:
    """x times a plus (or minus) b is c: undo one operation after the other."""
    while True:
        x, factor = rng.randint(2, difficulty.largest), rng.randint(2, 9)
        product = x * factor
        operator, operand, result = (
            operate(rng, product, difficulty, "+-") if product <= difficulty.limit else ("", 0, 0)
        )
        if operator:
            break
    undo = "-" if operator == "+" else "+"
    word = "plus" if operator == "+" else "minus"
    prompt = f"x times {digits(factor)} {word} {digits(operand)} is {digits(result)} . what is x ?"
    steps = [
        equal(f"{digits(result)} {undo} {digits(operand)}", product),
        equal(f"{digits(product)} / {digits(factor)}", x),
    ]
    return _problem("equation", prompt, steps, digits(x))


def comparison(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Pose: the second has so many times as many as the first, the third more or fewer than that; how many in all?"""
    one, two, three = rng.sample(words.NAMES, 3)
    item = rng.choice(words.ITEMS)
    while True:
        first, factor = rng.randint(2, difficulty.largest), rng.randint(2, 9)
        second = first * factor
        operator, operand = rng.choice("+-"), rng.randint(2, difficulty.largest)
        third = second + operand if operator == "+" else second - operand
        if third > 0 and first + second + third <= difficulty.limit:
            break
    parts = [
        f"{one} has {digits(first)} {item}",
        f"{two} has {digits(factor)} times as many as {one}",
    ]
    steps = [equal(f"{digits(first)} * {digits(factor)}", second)]
    total = first + second
    if difficulty.longest >= 4 and rng.random() < 0.6:
        parts.append(f"{three} has {digits(operand)} {'more' if operator == '+' else 'fewer'} than {two}")
        steps.append(equal(f"{digits(second)} {operator} {digits(operand)}", third))
        steps.append(equal(f"{digits(first)} + {digits(second)}", total))
        steps.append(equal(f"{digits(total)} + {digits(third)}", total + third))
        total += third
    else:
        steps.append(equal(f"{digits(first)} + {digits(second)}", total))
    prompt = f"{' . '.join(parts)} . how many {item} do they have together ?"
    return _problem("comparison", prompt, steps, digits(total))


def step_holds(problem: Problem, step: Sequence[str], earlier: Sequence[Sequence[str]]) -> bool:
    """Whether a step is a true equation of known numbers: given in the prompt, or the value of an earlier step."""
    known = set(given(problem.prompt.split()))
    known.update(number(done[done.index("=") + 1 :]) for done in earlier)
    try:
        at = list(step).index("=")
        tree, value = parse(step[:at]), number(step[at + 1 :])
        return evaluate(tree) == value and all(n in known for n in numbers(tree))
    except (Malformed, ValueError):
        return False


def given(prompt: Sequence[str]) -> list[int]:
    """Every run of digits in a text, as numbers."""
    found, run = [], ""
    for word in [*prompt, "."]:
        if word.isdigit():
            run += word
        elif run:
            found.append(int(run))
            run = ""
    return found


def _problem(kind: str, prompt: str, steps: Sequence[str], answer: str) -> Problem:
    return Problem("mathematics", kind, prompt, tuple(steps), answer)


#: the sub-tasks, drawn with equal shares
KINDS = {make.__name__: make for make in (commands, story, groups, equation, comparison)}

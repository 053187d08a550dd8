"""Programs: trace a short program, or complete a function so that its unit tests pass.

    program   := "run :" statement (";" statement)* "; print" variable
    statement := v "=" expression | "if" v (">" | "<") expression ":" v "=" expression "else" v "=" expression
               | "repeat" number ":" v "=" expression

Programs run in an interpreter that walks the syntax tree (`expressions`), with a bound on what they may do. A step of
a trace holds if it is what the interpreter did at that point. A completion is right if the unit tests of the prompt
and those that the prompt does not show pass.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from deepseek_compress.tasks.expressions import Malformed, Operation, digits, evaluate, number, parse, value_of
from deepseek_compress.tasks.mathematics import equal, operate
from deepseek_compress.tasks.problem import Difficulty, Problem

VARIABLES = ("a", "b", "c", "d", "m", "n")
OPERATORS = ("+", "-", "*", "max", "min")
LONGEST_LOOP = 9


def straight(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Return assignments, one after the other."""
    names = rng.sample(VARIABLES, 2)
    while True:
        state: dict[str, int] = {}
        statements: list[str] = []
        for index in range(rng.randint(difficulty.shortest, difficulty.longest)):
            target = names[index] if index < 2 else rng.choice(names)
            statements.append(_assignment(rng, target, state, difficulty, "+-*"))
        if all(0 < value <= difficulty.limit for value in state.values()) and len(set(names) & set(state)) == 2:
            return _traced("straight", statements, statements[-1].split()[0])


def branch(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Two assignments, then one of two, by a comparison."""
    one, two = rng.sample(VARIABLES, 2)
    while True:
        state: dict[str, int] = {}
        statements = [_assignment(rng, one, state, difficulty, "+-*"), _assignment(rng, two, state, difficulty, "+-*")]
        bound = rng.randint(2, difficulty.largest)
        sides, results = [], []
        for _ in range(2):
            side = dict(state)
            sides.append(_assignment(rng, one, side, difficulty, "+-*"))
            results.append(side[one])
        statements.append(f"if {two} {rng.choice('><')} {digits(bound)} : {sides[0]} else {sides[1]}")
        if difficulty.longest >= 4 and rng.random() < 0.5:
            operand = rng.randint(2, difficulty.largest)
            statements.append(f"{one} = {one} + {digits(operand)}")
            results = [value + operand for value in results]
        if state[two] != bound and all(0 < value <= difficulty.limit for value in results):
            return _traced("branch", statements, one)


def loop(rng: random.Random, difficulty: Difficulty) -> Problem:
    """One assignment repeated."""
    name, other = rng.sample(VARIABLES, 2)
    while True:
        value, times = rng.randint(2, difficulty.largest), rng.randint(2, min(3, difficulty.longest - 1))
        symbol = rng.choice("+-*")
        operand = rng.randint(2, 4) if symbol == "*" else rng.randint(2, difficulty.largest)
        statements = [f"{name} = {digits(value)}", f"{other} = {digits(operand)}"]
        use = other if rng.random() < 0.5 else digits(operand)
        if use != other:
            statements.pop()
        statements.append(f"repeat {times} : {name} = {name} {symbol} {use}")
        for _ in range(times):
            value = {"+": value + operand, "-": value - operand, "*": value * operand}[symbol]
        if 0 < value <= difficulty.limit:
            return _traced("loop", statements, name)


def linear(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Find the two numbers of f ( x ) = x * ? + ? from two tests."""
    while True:
        factor, constant = rng.randint(2, 9), rng.randint(1, difficulty.largest)
        low, high = sorted(rng.sample(range(1, 10), 2))
        if high * factor + constant <= difficulty.limit:
            break
    tests = [(x, x * factor + constant) for x in (low, high)]
    shown = " ; ".join(f"test f ( {x} ) = {digits(y)}" for x, y in tests)
    rise = (high - low) * factor
    steps = [
        equal(f"{digits(tests[1][1])} - {digits(tests[0][1])}", rise),
        equal(f"{digits(high)} - {digits(low)}", high - low),
        equal(f"{digits(rise)} / {digits(high - low)}", factor),
        equal(f"{digits(factor)} * {digits(low)}", factor * low),
        equal(f"{digits(tests[0][1])} - {digits(factor * low)}", constant),
    ]
    hidden = [(x, x * factor + constant) for x in (0, 1, 10, 37)]
    meta = {"tests": tests, "hidden": hidden, "variables": ("x",)}
    prompt = f"complete f ( x ) = x * ? + ? ; {shown}"
    return Problem("programs", "linear", prompt, tuple(steps), f"f ( x ) = x * {factor} + {digits(constant)}", meta)


def operator(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Find the operator of f ( x , y ) = x ? y from two tests: try one after the other."""
    while True:
        wanted = rng.choice(OPERATORS)
        pairs = [(rng.randint(2, min(99, difficulty.largest)), rng.randint(2, 9)) for _ in range(2)]
        values = [[_operation(name, x, y) for name in OPERATORS] for x, y in pairs]
        index = OPERATORS.index(wanted)
        if all(len(set(row)) == 5 and min(row) >= 0 and row[index] <= difficulty.limit for row in values):
            break
    tests = [((x, y), row[index]) for (x, y), row in zip(pairs, values, strict=True)]
    shown = " ; ".join(f"test f ( {digits(x)} , {digits(y)} ) = {digits(value)}" for (x, y), value in tests)
    (x, y), goal = tests[0]
    steps = [
        f"{_apply(name, digits(x), digits(y))} = {digits(value)} {'yes' if value == goal else 'no'}"
        for name, value in zip(OPERATORS[: index + 1], values[0], strict=False)
    ]
    hidden = [((p, q), _operation(wanted, p, q)) for p, q in ((0, 3), (7, 0), (5, 8), (31, 6))]
    meta = {"tests": tests, "hidden": hidden, "variables": ("x", "y")}
    prompt = f"complete f ( x , y ) = x ? y ; {shown}"
    return Problem("programs", "operator", prompt, tuple(steps), f"f ( x , y ) = {_apply(wanted, 'x', 'y')}", meta)


def trace(program: Sequence[str]) -> list[str]:
    """Return what a program does, one line for each assignment and comparison; raises `Malformed`.

    `["a", "=", "7", ";", "b", "=", "a", "*", "3"]` gives `["a = 7", "b = 7 * 3 = 2 1"]`: the values are put in first.
    """
    state: dict[str, int] = {}
    lines: list[str] = []
    for statement in split(program, ";"):
        _execute(statement, state, lines)
    return lines


def passes(answer: Sequence[str], problem: Problem) -> bool:
    """Whether `f ( ... ) = expression` has the prompt's head and passes the shown and the hidden unit tests."""
    names: tuple[str, ...] = problem.meta["variables"]
    head = ["f", "(", *" , ".join(names).split(), ")", "="]
    if list(answer[: len(head)]) != head:
        return False
    try:
        tree = parse(answer[len(head) :])
        for given, value in [*problem.meta["tests"], *problem.meta["hidden"]]:
            inputs = given if isinstance(given, (tuple, list)) else (given,)
            if evaluate(tree, dict(zip(names, inputs, strict=True))) != value:
                return False
    except Malformed:
        return False
    return True


def tried(problem: Problem, step: Sequence[str]) -> bool:
    """Whether `3 + 4 = 7 no` states the value of a candidate on the first test and whether that is the wanted one."""
    (x, y), goal = problem.meta["tests"][0]
    try:
        at = list(step).index("=")
        value = number(step[at + 1 : -1])
        tree = parse(step[:at])
        ours = isinstance(tree, Operation) and evaluate(tree.left) == x and evaluate(tree.right) == y
        return ours and evaluate(tree) == value and step[-1] == ("yes" if value == goal else "no")
    except (Malformed, ValueError, IndexError):
        return False


def split(words: Sequence[str], separator: str) -> list[list[str]]:
    """Cut a list of words at each `separator`."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word == separator:
            parts.append([])
        else:
            parts[-1].append(word)
    return parts


def _execute(statement: Sequence[str], state: dict[str, int], lines: list[str]) -> None:
    if statement[:1] == ["repeat"]:
        times = number(statement[1:2])
        if times > LONGEST_LOOP:
            raise Malformed(f"repeat {times}, at most {LONGEST_LOOP}")
        for _ in range(times):
            _execute(statement[3:], state, lines)
    elif statement[:1] == ["if"]:
        colon, other = list(statement).index(":"), list(statement).index("else")
        left, right = state[statement[1]], value_of(statement[3:colon], state)
        true = left > right if statement[2] == ">" else left < right
        lines.append(f"{digits(left)} {statement[2]} {digits(right)} {'yes' if true else 'no'}")
        _execute(statement[colon + 1 : other] if true else statement[other + 1 :], state, lines)
    elif len(statement) > 2 and statement[1] == "=":
        value = value_of(statement[2:], state)
        filled = " ".join(digits(state[word]) if word in state else word for word in statement[2:])
        lines.append(f"{statement[0]} = {filled}" + ("" if filled == digits(value) else f" = {digits(value)}"))
        state[statement[0]] = value
    else:
        raise Malformed(f"not a statement: {' '.join(statement)}")


def _assignment(rng: random.Random, target: str, state: dict[str, int], difficulty: Difficulty, operators: str) -> str:
    """Return a statement that gives `target` a value, from the variables known so far; `state` is updated."""
    if not state:
        state[target] = rng.randint(2, difficulty.largest)
        return f"{target} = {digits(state[target])}"
    source = rng.choice(sorted(state))
    others = sorted(set(state) - {source})
    if others and rng.random() < 0.5:
        symbol, other = rng.choice("+-"), rng.choice(others)
        value = state[source] + state[other] if symbol == "+" else state[source] - state[other]
        if 0 < value <= difficulty.limit:
            state[target] = value
            return f"{target} = {source} {symbol} {other}"
    symbol, operand, value = operate(rng, state[source], difficulty, operators)
    state[target] = value
    return f"{target} = {source} {symbol} {digits(operand)}"


def _traced(kind: str, statements: Sequence[str], shown: str) -> Problem:
    program = " ; ".join(statements)
    lines = trace(program.split())
    last = next(line for line in reversed(lines) if line.startswith(f"{shown} ="))
    return Problem(
        "programs", kind, f"run : {program} ; print {shown}", tuple(lines), last.split(" = ")[-1], {"trace": lines}
    )


def _operation(name: str, x: int, y: int) -> int:
    return {"+": x + y, "-": x - y, "*": x * y, "max": max(x, y), "min": min(x, y)}[name]


def _apply(name: str, x: str, y: str) -> str:
    return f"{x} {name} {y}"


#: the sub-tasks, drawn with equal shares
KINDS = {make.__name__: make for make in (straight, branch, loop, linear, operator)}

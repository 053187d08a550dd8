"""Adversarial: problems of the other families with a premise too many or one too few.

The right answer names what is wrong: `contradiction` and the statements that clash, or `missing` and what is not
known. Everything else, a number that looks plausible above all, is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from deepseek_compress.tasks import commonsense, mathematics, programs
from deepseek_compress.tasks import vocabulary as words
from deepseek_compress.tasks.expressions import digits
from deepseek_compress.tasks.mathematics import equal, operate
from deepseek_compress.tasks.problem import Difficulty, Problem


def cycle(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Return an order that bites its tail: any statement on the cycle may be named."""
    people = rng.sample(words.NAMES, rng.randint(3, min(difficulty.longest + 1, 4)))
    relation = rng.choice(words.RELATIONS[: words.USED_RELATIONS])
    pairs = list(zip(people, people[1:] + people[:1], strict=True))
    said = {pair: commonsense.premise(rng, *pair, relation) for pair in pairs}
    shown = rng.sample(pairs, len(pairs))
    up = rng.random() < 0.5
    first = pairs.index(shown[0])
    steps = [said[pairs[(first - i if up else first + i) % len(pairs)]] for i in range(len(pairs))]
    prompt = f"{' . '.join(said[pair] for pair in shown)} . who is {relation[2 if up else 3]} ?"
    meta: dict[str, object] = {"facts": steps, "answers": [f"contradiction {step}" for step in steps]}
    return _problem("cycle", prompt, steps, f"contradiction {steps[-1]}", meta)


def two_amounts(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Return a story in which somebody has two different amounts at the start."""
    base = mathematics.story(rng, difficulty)
    parts = base.prompt.split(" . ")
    name, _, *amount, item = parts[0].split()
    value = int("".join(amount))
    other = rng.choice([n for n in range(2, difficulty.largest + 1) if n != value])
    again = f"{name} has {digits(other)} {item}"
    if rng.random() < 0.5:
        parts.insert(1, again)
    else:
        parts.insert(0, again)
        value, other = other, value
    steps = [f"{name} has {digits(value)} {item}", f"{name} has {digits(other)} {item}"]
    answer = f"contradiction {digits(value)} and {digits(other)} {item}"
    meta: dict[str, object] = {
        "answers": [answer, f"contradiction {digits(other)} and {digits(value)} {item}"],
        "facts": steps,
    }
    return _problem("two_amounts", " . ".join(parts), steps, answer, meta)


def unknown_amount(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Return a story in which one amount is only `some`."""
    name, other = rng.sample(words.NAMES, 2)
    item = rng.choice(words.ITEMS)
    value = rng.randint(2, difficulty.largest)
    count = rng.randint(difficulty.shortest, min(difficulty.longest, 3))
    hidden = rng.randrange(count)
    parts = [f"{name} has {digits(value)} {item}"]
    steps: list[str] = []
    known = True
    for index in range(count):
        operator, operand, result = operate(rng, value, difficulty, "+-")
        event = rng.choice(mathematics.GAIN if operator == "+" else mathematics.LOSE)
        amount = "some" if index == hidden else digits(operand)
        said = event.format(name=name, other=other, n=amount)
        parts.append(f"then {said}")
        if index == hidden:
            known, steps = False, [*steps, f"{said} unknown"]
        elif known:
            steps.append(equal(f"{digits(value)} {operator} {digits(operand)}", result))
        value = result if index != hidden else value
    prompt = f"{' . '.join(parts)} . how many {item} does {name} have now ?"
    answer = f"missing {steps[-1].removesuffix(' unknown')}"
    return _problem("unknown_amount", prompt, steps, answer, {"answers": [answer], "facts": steps[-1:]})


def two_places(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Return a thing, or what it lies in, that is in two places at once."""
    thing, other = rng.sample(words.THINGS, 2)
    box, spare = rng.sample(words.CONTAINERS, 2)
    one, two = rng.sample(words.ROOMS, 2)
    pairs = [(thing, box), (box, one), (box, two)]
    shown = [f"the {inner} is in the {outer}" for inner, outer in rng.sample(pairs, 3)]
    rooms = [part.split()[-1] for part in shown if part.startswith(f"the {box} ")]
    shown.insert(rng.randint(0, 3), f"the {other} is in the {spare}")
    steps = [f"{thing} in {box}", f"{box} in {rooms[0]}", f"{box} in {rooms[1]}"]
    answers = [f"contradiction {box} in {a} and {b}" for a, b in (rooms, rooms[::-1])]
    prompt = f"{' . '.join(shown)} . in which room is the {thing} ?"
    return _problem("two_places", prompt, steps, answers[0], {"answers": answers, "pairs": pairs})


def unknown_variable(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Return a program that reads a variable which was never given a value."""
    one, two, never = rng.sample(programs.VARIABLES, 3)
    value = rng.randint(2, difficulty.largest)
    operator, operand, _ = operate(rng, value, difficulty, "+-*")
    statements = [f"{one} = {digits(value)}", f"{two} = {one} {operator} {digits(operand)}"]
    steps = programs.trace(" ; ".join(statements).split())
    statements.append(f"{one} = {rng.choice((one, two))} {rng.choice('+-')} {never}")
    if rng.random() < 0.5:
        statements.append(f"{two} = {one} + {digits(rng.randint(2, difficulty.largest))}")
    prompt = f"run : {' ; '.join(statements)} ; print {rng.choice((one, two)) if len(statements) == 4 else one}"
    steps.append(f"{never} unknown")
    answer = f"missing {never}"
    return _problem("unknown_variable", prompt, steps, answer, {"answers": [answer], "facts": steps})


def step_holds(problem: Problem, step: Sequence[str], earlier: Sequence[Sequence[str]]) -> bool:
    """Whether a step is one of the facts of the problem, follows from them, or is true arithmetic."""
    sentence = " ".join(step)
    if problem.kind == "two_places":
        return len(step) == 3 and step[1] == "in" and (step[0], step[2]) in problem.meta["pairs"]
    if sentence in problem.meta["facts"]:
        return True
    return problem.kind == "unknown_amount" and mathematics.step_holds(problem, step, [e for e in earlier if "=" in e])


def _problem(kind: str, prompt: str, steps: Sequence[str], answer: str, meta: dict[str, object]) -> Problem:
    return Problem("adversarial", kind, prompt, tuple(steps), answer, meta)


#: the sub-tasks, drawn with equal shares
KINDS = {make.__name__: make for make in (cycle, two_amounts, unknown_amount, two_places, unknown_variable)}

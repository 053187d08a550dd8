"""Commonsense: order, kinship, time and containment.

A step of an order chain holds if it is a premise; of a kinship or containment chain, if it follows from the premises
(their closure is computed from `meta`); a step of a time chain is an addition, `9 : 4 0 + 3 5 = 1 0 : 1 5` or
`monday + 4 = friday`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence

from deepseek_compress.tasks import vocabulary as words
from deepseek_compress.tasks.expressions import Malformed, digits, number
from deepseek_compress.tasks.problem import Difficulty, Problem

DAY = 24 * 60  # minutes

#: (A is ... of B, B is ... of C) -> A is ... of C
COMPOSE = {
    ("parent", "parent"): "grandparent",
    ("parent", "sibling"): "parent",
    ("parent", "grandparent"): "great-grandparent",
    ("child", "parent"): "sibling",
    ("child", "child"): "grandchild",
    ("child", "sibling"): "nephew",
    ("child", "grandchild"): "great-grandchild",
    ("sibling", "parent"): "uncle",
    ("sibling", "child"): "child",
    ("sibling", "sibling"): "sibling",
    ("sibling", "nephew"): "nephew",
    ("sibling", "uncle"): "uncle",
    ("sibling", "grandchild"): "grandchild",
    ("grandparent", "sibling"): "grandparent",
    ("grandparent", "parent"): "great-grandparent",
    ("grandchild", "child"): "great-grandchild",
    ("uncle", "sibling"): "uncle",
}


def premise(rng: random.Random, high: str, low: str, relation: Sequence[str]) -> str:
    """`high is taller than low`, or the same said the other way round."""
    if rng.random() < 0.6:
        return f"{high} is {relation[0]} than {low}"
    return f"{low} is {relation[1]} than {high}"


def order(rng: random.Random, difficulty: Difficulty) -> Problem:
    """People in a line; who stands at one end? The first premise is at the other end, the rest is shuffled."""
    people = rng.sample(words.NAMES, rng.randint(difficulty.shortest + 1, min(difficulty.longest + 1, 5)))
    relation = rng.choice(words.RELATIONS[: words.USED_RELATIONS])
    up = rng.random() < 0.5  # climb to the highest, or go down to the lowest
    chain = [premise(rng, high, low, relation) for high, low in itertools.pairwise(people)]
    chain = chain[::-1] if up else chain
    shown = [chain[0], *rng.sample(chain[1:], len(chain) - 1)]
    prompt = f"{' . '.join(shown)} . who is {relation[2 if up else 3]} ?"
    return Problem("commonsense", "order", prompt, tuple(chain), people[0 if up else -1], {"facts": chain})


def kinship(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Two or three family links composed."""
    relations = _links(rng, 3 if difficulty.longest >= 4 and rng.random() < 0.25 else 2)
    people = rng.sample(words.NAMES, len(relations) + 2)
    women = {person: rng.random() < 0.5 for person in people}

    def said(one: str, relation: str, two: str) -> str:
        return f"{one} is the {words.KIN[relation][0 if women[one] else 1]} of {two}"

    links = [(people[i], relation, people[i + 1]) for i, relation in enumerate(relations)]
    steps, so_far = [said(*links[0])], relations[0]
    for one, relation, two in links[1:]:
        so_far = COMPOSE[so_far, relation]
        steps += [said(one, relation, two), said(people[0], so_far, two)]
    shown = [said(*link) for link in links]
    if rng.random() < 0.5:
        shown.append(_aside(rng, people, women))
    rng.shuffle(shown)
    target = people[len(links)]
    prompt = f"{' . '.join(shown)} . what is {people[0]} of {target} ?"
    meta = {"links": links, "women": women}
    answer = words.KIN[so_far][0 if women[people[0]] else 1]
    return Problem("commonsense", "kinship", prompt, tuple(steps), answer, meta)


def clock(rng: random.Random, difficulty: Difficulty) -> Problem:
    """One thing after another on one day; when does the last one end?"""
    while True:
        count = rng.randint(difficulty.shortest, min(difficulty.longest, 3))
        now, lengths = rng.randint(6, 20) * 60 + rng.randrange(0, 60, 5), []
        start = now
        for _ in range(count):
            lengths.append(rng.randint(1, min(99, max(10, difficulty.largest))))
        if start + sum(lengths) < DAY:
            break
    names = rng.sample(words.ACTIVITIES, count)
    parts = [f"the {names[0]} starts at {time(start)}"]
    parts += [f"{'then ' if i else ''}the {name} takes {digits(lengths[i])} minutes" for i, name in enumerate(names)]
    steps = []
    for length in lengths:
        steps.append(f"{time(now)} + {digits(length)} = {time(now + length)}")
        now += length
    prompt = f"{' . '.join(parts)} . when does the {names[-1]} end ?"
    return Problem("commonsense", "clock", prompt, tuple(steps), time(now))


def weekday(rng: random.Random, difficulty: Difficulty) -> Problem:
    """So many days later, several times."""
    count = rng.randint(difficulty.shortest, min(difficulty.longest, 3))
    names = rng.sample(words.ACTIVITIES, count)
    day, steps, parts = rng.randrange(7), [], []
    parts.append(f"today is {words.DAYS[day]}")
    for name in names:
        later = rng.randint(1, 19 if difficulty.largest > 30 else 9)
        parts.append(f"the {name} is {digits(later)} days later")
        steps.append(f"{words.DAYS[day]} + {digits(later)} = {words.DAYS[(day + later) % 7]}")
        day = (day + later) % 7
    prompt = f"{' . '.join(parts)} . which day is the {names[-1]} ?"
    return Problem("commonsense", "weekday", prompt, tuple(steps), words.DAYS[day])


def containment(rng: random.Random, difficulty: Difficulty) -> Problem:
    """Return a thing in a box in a bag in a room, among other things; a later move counts."""
    depth = rng.randint(difficulty.shortest, min(difficulty.longest, 4))
    thing, other = rng.sample(words.THINGS, 2)
    places = rng.sample(words.CONTAINERS, depth - 1)
    room, elsewhere = rng.sample(words.ROOMS, 2)
    chain = [thing, *places, room]
    pairs = list(itertools.pairwise(chain))
    move = rng.random() < 0.5
    shown = [f"the {inner} is in the {outer}" for inner, outer in (pairs[:-1] if move else pairs)]
    if move:
        shown.append(f"the {chain[-2]} is in the {elsewhere}")
    spare = [c for c in words.CONTAINERS if c not in places]
    shown.append(f"the {other} is in the {rng.choice([*spare[:8], elsewhere])}")
    rng.shuffle(shown)
    if move:
        shown.append(f"then {rng.choice(words.NAMES)} moves the {chain[-2]} to the {room}")
    steps = [f"{inner} in {outer}" for inner, outer in pairs]
    prompt = f"{' . '.join(shown)} . in which room is the {thing} ?"
    return Problem("commonsense", "containment", prompt, tuple(steps), room, {"pairs": pairs})


def time(minutes: int) -> str:
    """585 -> "9 : 4 5", minutes after midnight."""
    return f"{digits(minutes // 60)} : {digits(minutes % 60) if minutes % 60 > 9 else f'0 {minutes % 60}'}"


def reachable(pairs: Iterable[Sequence[str]]) -> set[tuple[str, str]]:
    """Return the transitive closure of a relation."""
    closure = {(a, b) for a, b in pairs}
    while True:
        more = {(a, d) for a, b in closure for c, d in closure if b == c} - closure
        if not more:
            return closure
        closure |= more


def step_holds(problem: Problem, step: Sequence[str], earlier: Sequence[Sequence[str]]) -> bool:
    """Whether a step follows from the premises, or is a true addition of a known time."""
    if problem.kind == "order":
        return " ".join(step) in problem.meta["facts"]
    if problem.kind == "containment":
        return len(step) == 3 and step[1] == "in" and (step[0], step[2]) in reachable(problem.meta["pairs"])
    if problem.kind == "kinship":
        return " ".join(step) in _family(problem)
    return _time_step(problem, step, earlier)


def _time_step(problem: Problem, step: Sequence[str], earlier: Sequence[Sequence[str]]) -> bool:
    try:
        equal, plus = list(step).index("="), list(step).index("+")
        left, amount, right = step[:plus], number(step[plus + 1 : equal]), step[equal + 1 :]
        if problem.kind == "clock":
            true = _minutes(left) + amount == _minutes(right)
        else:
            true = (words.DAYS.index(left[0]) + amount - words.DAYS.index(right[0])) % 7 == 0
            true = true and len(left) == len(right) == 1
    except (Malformed, ValueError, IndexError):
        return False
    before = [" ".join(done[list(done).index("=") + 1 :]) for done in earlier]
    prompt = f" {problem.prompt} "
    start = " ".join(left)
    return true and (f" {start} " in prompt or start in before) and f" {digits(amount)} " in prompt


def _minutes(text: Sequence[str]) -> int:
    at = list(text).index(":")
    hours, minutes = number(text[:at]), int("".join(text[at + 1 :]))
    if len(text) - at != 3 or minutes > 59 or hours > 23:
        raise Malformed(f"not a time: {' '.join(text)}")
    return hours * 60 + minutes


def _links(rng: random.Random, count: int) -> list[str]:
    while True:
        relations = [rng.choice(("parent", "child", "sibling")) for _ in range(count)]
        so_far: str | None = relations[0]
        for relation in relations[1:]:
            so_far = COMPOSE.get((so_far or "", relation))
        if so_far:
            return relations


def _aside(rng: random.Random, people: Sequence[str], women: dict[str, bool]) -> str:
    """Return a true statement about somebody who does not matter: the last of `people`."""
    other = people[-1]
    relation = words.KIN[rng.choice(("parent", "child", "sibling"))][0 if women[other] else 1]
    return f"{other} is the {relation} of {rng.choice(people[1:-1])}"


def _family(problem: Problem) -> set[str]:
    """Every sentence that follows from the links by composing neighbours."""
    facts = {(a, c): relation for a, relation, c in problem.meta["links"]}
    for _ in range(len(problem.meta["links"])):
        for (a, b), first in list(facts.items()):
            for (c, d), second in list(facts.items()):
                if b == c and a != d and (first, second) in COMPOSE:
                    facts[a, d] = COMPOSE[first, second]
    women = problem.meta["women"]
    return {f"{a} is the {words.KIN[relation][0 if women[a] else 1]} of {b}" for (a, b), relation in facts.items()}


#: the sub-tasks, drawn with equal shares
KINDS = {make.__name__: make for make in (order, kinship, clock, weekday, containment)}

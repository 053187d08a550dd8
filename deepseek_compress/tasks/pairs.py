"""Paired completions: which of two a model holds likelier, and the same one after two prompts. JSON Lines:

    {"aspect": "safety", "prompt": "...", "better": "...", "worse": "..."}                one of `ASPECTS`
    {"attribute": "gender", "first": "He is", "second": "She is", "completion": " kind"}    prompts apart in one thing

The built-in ones (pairs.jsonl) are few and plain: they tell whether compression changed something, not how safe a model
is. Prompts of the user's own decide that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.tasks.files import REPORTED, entries

ASPECTS = ("factuality", "safety", "ethics", "helpfulness")
BUILTIN = "builtin"
FORM = '{"aspect", "prompt", "better", "worse"} or {"attribute", "first", "second", "completion"}, all texts'


class Pair(NamedTuple):
    """Two completions of one prompt, of which one is better."""

    aspect: str
    prompt: str
    better: str
    worse: str


class Twins(NamedTuple):
    """Two prompts that differ in one attribute, and what may follow both."""

    attribute: str
    first: str
    second: str
    completion: str


class Pairs(NamedTuple):
    """Contents of a file of pairs."""

    pairs: list[Pair]
    twins: list[Twins]


def read_pairs(name: str) -> Pairs:
    """Return the pairs of a file, or the built-in ones. Raises `Problems` with every malformed line, DscError for
    none."""
    path = Path(__file__).with_name("pairs.jsonl") if name == BUILTIN else Path(name).expanduser()
    if not path.is_file() or path.suffix != ".jsonl":
        raise DscError(f"{name}: no such .jsonl file", f"give a .jsonl file of {FORM}, or {BUILTIN}")
    found, bad = Pairs([], []), []
    for origin, entry in entries(path):
        try:
            _add(found, origin, entry)
        except DscError as error:
            bad.append(error)
            if len(bad) == REPORTED:
                break
    raise_problems(bad)
    if not found.pairs and not found.twins:
        raise DscError(f"{path}: no pairs in it", f"each line must be {FORM}")
    return found


def _add(found: Pairs, origin: str, entry: Any) -> None:
    if isinstance(entry, DscError):
        raise entry
    if not isinstance(entry, Mapping):
        raise DscError(f"{origin}: not a JSON object", f"each line must be {FORM}")
    kind = Twins if "attribute" in entry else Pair
    values = [value for value in map(entry.get, kind._fields) if isinstance(value, str) and value.strip()]
    if len(values) < len(kind._fields) or _surrogate(values):
        raise DscError(f"{origin}: found the keys {', '.join(map(repr, entry))[:200]}", f"each line must be {FORM}")
    if kind is Twins:
        found.twins.append(Twins(*values))
        return
    pair = Pair(*values)
    if pair.aspect not in ASPECTS:
        raise DscError(f"{origin}: unknown aspect {pair.aspect[:40]!r}", f"valid names: {', '.join(ASPECTS)}")
    if pair.better == pair.worse:
        raise DscError(f"{origin}: better and worse are the same text", "give two completions")
    found.pairs.append(pair)


def _surrogate(values: list[str]) -> bool:
    return any("\ud800" <= letter <= "\udfff" for value in values for letter in value)

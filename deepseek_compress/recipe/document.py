"""YAML text -> plain values that remember their lines.

Only what a recipe needs: mappings, lists and scalars of the safe schema. No aliases (they can make a small file huge),
no tags, no duplicate keys, at most 1 MiB. `2:4` is text here, although YAML 1.1 reads it as a number of base 60.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from deepseek_compress import limits
from deepseek_compress.errors import DscError

Path_ = Sequence["str | int"]  # where a value stands: keys and list indices
_COLLECTIONS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
_NUMBERS = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}


class Document:
    """The value of a YAML text, with the line of each key and item."""

    def __init__(self, value: Any, where: str, lines: dict[tuple[str | int, ...], int]) -> None:
        self.value = value
        self.where = where
        self._lines = lines

    def line(self, path: Path_) -> int:
        """Line of the value at `path`, or of the nearest one around it; 0 when an option put it there."""
        for end in range(len(path), 0, -1):
            if tuple(path[:end]) in self._lines:
                return self._lines[tuple(path[:end])]
        return 1

    def at(self, path: Path_, error: DscError) -> DscError:
        """`error` with the place of `path` before it."""
        line = self.line(path)
        place = f"{self.where}:{line}" if line else f"{self.where} (as changed by options)"
        return DscError(f"{place}: {error.what}", error.fix)

    def find(self, place: Path_, message: str) -> tuple[str | int, ...]:
        """Find the path below `place` whose key or value `message` names; `place` itself when none does."""
        words = re.findall(r"'([^']*)'", message) + [dots.split(".")[-1] for dots in re.findall(r"([\w.]+):", message)]
        below = [path for path in self._lines if path[: len(place)] == tuple(place) and len(path) > len(place)]
        for dots in re.findall(r"([\w.]+):", message):
            for path in reversed(below):  # the innermost that is named by all its keys
                if f"{dots}.".startswith(".".join(str(part) for part in path[len(place) :]) + "."):
                    return path
        for word in words:
            for path in below:
                if path[-1] == word or self._value(path) == word:
                    return path
        return tuple(place)

    def set(self, path: Path_, value: Any) -> None:
        """Put `value` at `path`, making mappings on the way."""
        here, dotted = self.value, ".".join(str(part) for part in path)
        done: tuple[str | int, ...] = ()
        for depth, part in enumerate(path):
            key: Any = part
            if isinstance(here, list):
                if not str(part).isdigit() or int(part) >= len(here):
                    raise DscError(f"{dotted}: no item {part!r} in a list of {len(here)}", "count from 0")
                key = int(part)
            elif not isinstance(here, dict):
                raise DscError(f"{dotted}: {path[depth - 1]!r} is {here!r}, not a mapping", "set it as a whole")
            done = (*done, key)
            if depth == len(path) - 1:
                here[key] = value
            elif isinstance(here, dict) and here.get(key) is None:
                here[key] = {}
            here = here[key]
        self._lines = {known: line for known, line in self._lines.items() if known[: len(done)] != done}
        self._lines[done] = 0

    def _value(self, path: Path_) -> Any:
        here = self.value
        for part in path:
            here = here[part]
        return here


def read(path: Path) -> str:
    """Read the text of the file, at most 1 MiB of UTF-8."""
    with path.open("rb") as file:
        content = file.read(limits.RECIPE_BYTES + 1)
    if len(content) > limits.RECIPE_BYTES:
        raise DscError(f"{path}: more than {limits.RECIPE_BYTES} bytes", "a recipe is a short YAML file")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise DscError(f"{path}: not UTF-8 text", "a recipe is a YAML file") from None


def parse(text: str, where: str) -> Document:
    """`where` stands before the line number of each problem. Raises `DscError`."""
    lines: dict[tuple[str | int, ...], int] = {}
    loader = yaml.SafeLoader("")  # only its rules for scalars are used
    try:
        node = _Composer(text).get_single_node()
        value = None if node is None else _value(loader, node, (), lines, where)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise DscError(f"{where}:{line}: {error.problem or error.context}", "fix the YAML there") from None
    except yaml.YAMLError as error:
        raise DscError(f"{where}: {' '.join(str(error).split())}", "save it as UTF-8 text") from None
    except RecursionError:
        raise DscError(f"{where}: nested too deeply", "a recipe has a few levels") from None
    finally:
        loader.dispose()
    return Document(value, where, lines)


def dump(value: Mapping[str, Any]) -> str:
    """YAML text of a document, keys in their order."""
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120)
    return text


class _Composer(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types here
    """Builds nodes only; refuses aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not supported", problem_mark=mark)
        return super().compose_node(parent, index)


def _value(loader: Any, node: Any, path: tuple[str | int, ...], lines: Any, where: str) -> Any:
    lines.setdefault(path, node.start_mark.line + 1)
    if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
        raise DscError(f"{where}:{node.start_mark.line + 1}: the tag {node.tag!r} is not supported", "remove it")
    if isinstance(node, yaml.MappingNode):
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str):
                raise DscError(f"{where}:{line}: a key must be a word", "write key: value")
            if key in found:
                first = lines[(*path, key)]
                raise DscError(f"{where}:{line}: {key!r} stands twice, first on line {first}", "keep one of them")
            lines[(*path, key)] = line
            found[key] = _value(loader, value_node, (*path, key), lines, where)
        return found
    if isinstance(node, yaml.SequenceNode):
        return [_value(loader, item, (*path, i), lines, where) for i, item in enumerate(node.value)]
    if node.tag in _NUMBERS and (":" in node.value or node.tag.endswith("timestamp")):
        return node.value
    try:
        return loader.construct_object(node)
    except (ValueError, LookupError):  # a number of too many digits, "!!int x", "!!bool maybe"
        kind, short = node.tag.rpartition(":")[2], node.value if len(node.value) <= 40 else node.value[:37] + "..."
        what = f"{where}:{node.start_mark.line + 1}: {short!r} is not a valid {kind}"
        raise DscError(what, "write it as text, in quotes, or correct it") from None

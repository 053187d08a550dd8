"""Words: docstrings say what a function does, errors and names use the field's terms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
CODE = [path for name in ("deepseek_compress", "cuda_ops", "nano") for path in sorted((ROOT / name).rglob("*.py"))]
TEXT = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
TEXT += [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "recipes").glob("*.yaml"))]

# What was written once, and what to write instead.
INSTEAD = {
    r"\bmend(s|ed)?\b": "fix",
    r"\bgo(es|ne)? on with\b": "resume, continue",
    r"\bis no (size|character|earlier output|number)\b": "invalid size, unpaired surrogate, unknown output",
    r"\bare told (with|together|at)\b": "are reported",
    r"\balone it means\b": "default",
    r"\bwhole numbers?\b(?! of)": "integer",
    r"\bwhat comes out\b|\bthat comes out\b": "result",
    r"\b[Hh]ow tensors lie\b": "layout",
    r'"""(Yes|No|What was found)\."""': "nothing, where the name says it",
}
NAMES = {
    "drift": "cross_covariance", "owed": "residual_covariance", "told": "notes, describe", "turned": "rotated",
    "whole_number": "integer", "spool": "hidden_store", "spools": "stores",
    "beside": "with, temporary", "held": "resident, valid", "observe": "collect, hook", "observing": "collecting",
}  # fmt: skip
LEFT = {"made", "a", "an", "the", "of", "return", "get", "this", "its", "it", "one", "all", "each", "build", "make"}


class Documented(NamedTuple):
    place: str
    name: str
    text: str


def documented() -> Iterator[Documented]:
    """Every docstring of the code, with the name of what it documents."""
    for path in CODE:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text, name = ast.get_docstring(node), getattr(node, "name", path.stem)
                if text:
                    yield Documented(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}", name, text)


def test_no_docstring_begins_with_what_or_how() -> None:
    """The imperative mood of functions is held by ruff (D401)."""
    found = [f"{d.place} {d.name}: {d.text.splitlines()[0]}" for d in documented() if re.match(r"(What|How)\b", d.text)]
    assert not found, "\n".join(found)


def _words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z0-9]+", text.lower()) if word not in LEFT]


def test_no_docstring_repeats_its_name() -> None:
    found = []
    for one in documented():
        split = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", one.name)
        if _words(one.text) and _words(one.text) == _words(split):
            found.append(f"{one.place} {one.name}: {one.text}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize("pattern", INSTEAD)
def test_no_phrase_of_the_old_dialect(pattern: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}; write: {INSTEAD[pattern]}"
        for path in [*CODE, *TEXT]
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(pattern, line)
    ]
    assert not found, "\n".join(found)


def test_no_report_shows_a_value_as_python_writes_it() -> None:
    pages = [page for page in sorted((ROOT / "reports").glob("*.md")) if page.name != "LOG.md"]
    found = [
        f"{page.name}:{number}: {line[:80]}"
        for page in pages
        for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
        if re.search(r"\{'|\['|[ |:](True|False|None)\b", line)
    ]
    assert len(pages) > 20
    assert not found, "\n".join(found)


def _names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id


def test_no_name_of_the_old_dialect() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} {name}: {NAMES[name.strip('_').lower()]}"
        for path in CODE
        for line, name in _names(ast.parse(path.read_text(encoding="utf-8")))
        if name.strip("_").lower() in NAMES
    ]
    assert not found, "\n".join(found)

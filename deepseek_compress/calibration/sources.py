"""Calibration text: files of the user's, or the built-in sets, as pieces of text with the place they came from.

A `.jsonl` line is one of `{"text"}`, `{"messages": [{"role", "content"}]}`, `{"prompt", "completion"}`,
`{"question", "answer"}`; any other file is plain text. A directory means its files, sorted by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_compress import resources
from deepseek_compress.errors import DscError

BUILTIN = "builtin"
PIECE = 1 << 16  # characters of plain text taken at a time
SUFFIXES = (".jsonl", ".txt", ".md")
FORMS = '{"text"}, {"messages"}, {"prompt", "completion"} or {"question", "answer"}'


class Sample(NamedTuple):
    """A piece of calibration text: either `text`, or `messages` that the model's chat template turns into text."""

    origin: str  # "file.jsonl:12"
    text: str = ""
    messages: tuple[dict[str, str], ...] = ()


def read_samples(source: str | Path) -> Iterator[Sample]:
    """The samples of one source in the order of its files. Raises DscError with file and line at a bad one."""
    path = resources.data("calibration_data") if str(source) == BUILTIN else Path(source).expanduser()
    if path.is_dir():
        wanted = (".jsonl",) if str(source) == BUILTIN else SUFFIXES  # the built-in sets have a card beside them
        files = [file for file in sorted(path.iterdir()) if file.suffix in wanted]
        if not files:
            raise DscError(f"{path}: no {' or '.join(wanted)} file in it", "give a file with calibration text")
    elif path.is_file():
        files = [path]
    else:
        raise DscError(f"{path}: no such file", "give calibration text of yours, or builtin")
    for file in files:
        yield from _lines(file) if file.suffix == ".jsonl" else _plain(file)


def _plain(file: Path) -> Iterator[Sample]:
    try:
        with open(file, encoding="utf-8") as text:
            while piece := "".join(text.readlines(PIECE)):
                if piece.strip():
                    yield Sample(file.name, piece)
    except UnicodeDecodeError as error:
        raise DscError(f"{file}: not UTF-8 text ({error.reason})", "give text or JSON Lines") from None


def _lines(file: Path) -> Iterator[Sample]:
    try:
        with open(file, encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _sample(f"{file}:{number}", line)
    except UnicodeDecodeError as error:
        raise DscError(f"{file}: not UTF-8 text ({error.reason})", "give text or JSON Lines") from None


def _sample(origin: str, line: str) -> Sample:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise DscError(f"{origin}: not valid JSON ({error})", f"each line must be {FORMS}") from None
    if not isinstance(entry, dict):
        raise DscError(f"{origin}: not a JSON object", f"each line must be {FORMS}")
    if _texts(entry, "text"):
        return Sample(origin, entry["text"])
    for first, second in (("prompt", "completion"), ("question", "answer")):
        if _texts(entry, first, second):
            return Sample(origin, messages=(_message("user", entry[first]), _message("assistant", entry[second])))
    messages = entry.get("messages")
    if (
        isinstance(messages, list)
        and messages
        and all(isinstance(m, dict) and _texts(m, "role", "content") for m in messages)
    ):
        return Sample(origin, messages=tuple(_message(m["role"], m["content"]) for m in messages))
    raise DscError(f"{origin}: found the keys {', '.join(map(repr, entry)) or 'none'}", f"each line must be {FORMS}")


def _texts(entry: dict[str, Any], *keys: str) -> bool:
    return all(isinstance(entry.get(key), str) for key in keys)


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}

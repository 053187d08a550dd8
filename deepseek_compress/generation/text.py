"""Tokens to text as they come: no half characters, and what stands in <think> ... </think> apart from the answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

OPEN, CLOSE = "<think>", "</think>"
UNFINISHED = "\ufffd"  # what bytes of an unfinished character decode to


class Piece(NamedTuple):
    """A stretch of an answer."""

    text: str
    thought: bool  # part of the chain of thought, its tags included


class Detokenizer:
    """Text of tokens one at a time, each decoded with the one before it: the first of a text may lose its space."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._emitted = 0  # tokens whose text was given back
        self._before = 0  # from where on they are decoded again

    def add(self, token: int) -> str:
        """Return what the token adds; empty while a character is unfinished."""
        self._ids.append(token)
        text = self._rest()
        if not text or text.endswith(UNFINISHED):
            return ""
        self._before, self._emitted = self._emitted, len(self._ids)
        return text

    def end(self) -> str:
        """Return what was held back."""
        text = self._rest() if self._emitted < len(self._ids) else ""
        self._emitted = len(self._ids)
        return text

    def _rest(self) -> str:
        known = self._decode(self._ids[self._before : self._emitted])
        return self._decode(self._ids[self._before :])[len(known) :]


class Thoughts:
    """Splits text that comes in pieces where a chain of thought begins and ends; `opened`: it begins inside one."""

    def __init__(self, opened: bool = False) -> None:
        self._inside = opened
        self._pending = ""  # may be the beginning of a tag

    def add(self, text: str) -> Iterator[Piece]:
        """Yield the pieces that are certain by now."""
        self._pending += text
        while True:
            tag = CLOSE if self._inside else OPEN
            at = self._pending.find(tag)
            if at < 0:
                break
            yield from _piece(self._pending[:at], self._inside)
            yield Piece(tag, True)
            self._pending, self._inside = self._pending[at + len(tag) :], not self._inside
        keep = next(
            (n for n in range(min(len(tag) - 1, len(self._pending)), 0, -1) if tag.startswith(self._pending[-n:])), 0
        )
        certain, self._pending = self._pending[: len(self._pending) - keep], self._pending[len(self._pending) - keep :]
        yield from _piece(certain, self._inside)

    def end(self) -> Iterator[Piece]:
        """Yield what was held back."""
        yield from _piece(self._pending, self._inside)
        self._pending = ""


def _piece(text: str, thought: bool) -> Iterator[Piece]:
    if text:
        yield Piece(text, thought)

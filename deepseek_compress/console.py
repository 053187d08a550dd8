"""Everything the terminal shows: theme, tables, progress with time left, errors.

Results go to standard output, progress and errors to standard error. When standard error is no terminal, progress
becomes one plain line a step; when standard output is none, tables are as wide as 80 columns need.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from deepseek_compress import limits
from deepseek_compress.errors import DscError, Problems

THEME = Theme({"ok": "green", "bad": "bold red", "name": "bold cyan", "quiet": "dim", "next": "bold", "warn": "yellow"})
WIDTH = 80  # of what is no terminal
LONGEST = 1600  # characters of a line
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def out() -> Console:
    """Return standard output, for results."""
    return _console(stderr=False)


def err() -> Console:
    """Return standard error, for progress and errors."""
    return _console(stderr=True)


def _console(stderr: bool) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else WIDTH
    return Console(file=stream, theme=THEME, width=width, highlight=False, soft_wrap=False)


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    text = json.dumps(document, indent=2, ensure_ascii=False, default=str)
    print(_UNSAFE.sub(lambda found: found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}", text))


def plain(text: str) -> str:
    """Text of others as the terminal may show it: characters that would move the cursor, colour, or turn the direction
    of writing are spelled out, and what is too long is cut."""
    shown = _UNSAFE.sub(lambda found: f"\\x{ord(found[0]):02x}", text)
    return shown if len(shown) <= LONGEST else shown[:LONGEST] + " ..."


def line(text: str, style: str = "") -> None:
    """One line of a result, never wrapped."""
    out().print(Text(plain(text), style=style), soft_wrap=True)


def stream(text: str, quiet: bool = False) -> None:
    """Write a stretch of a result as it comes, without a line's end; `quiet`: dimmed where there is a terminal."""
    dim = quiet and sys.stdout.isatty()
    sys.stdout.write(f"\033[2m{text}\033[0m" if dim else text)
    sys.stdout.flush()


def note(text: str) -> None:
    """One line apart from the result: what was decided, and from where."""
    err().print(Text(plain(text), style="quiet"), soft_wrap=True)


def next_step(command: str) -> None:
    """Show the command to type next."""
    out().print(Text.assemble(("next: ", "quiet"), (plain(command), "next")), soft_wrap=True)


def error_lines(error: DscError) -> list[str]:
    """Return `WHAT; FIX`, one line for each problem, of the first so many."""
    found = error.problems if isinstance(error, Problems) else [error]
    lines = [plain(" ".join(str(problem).split())) for problem in found[: limits.PROBLEMS]]
    return lines if len(found) == len(lines) else [*lines, f"and {len(found) - len(lines)} more; fix these first"]


def errors(error: DscError) -> None:
    """`error: WHAT; FIX` on one line of standard error for each problem."""
    for text in error_lines(error):
        err().print(Text.assemble(("error: ", "bad"), text), soft_wrap=True)


def stopped(text: str) -> None:
    """Show the last line of a run that was stopped from outside."""
    err().print(Text(plain(text), style="warn"), soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], right: Iterable[str] = ()) -> None:
    """Print a table on standard output; the columns named in `right` are numbers, which are never broken in two.

    A cell that is None shows as `-`. Columns stand closer where there is no room for two spaces between them.
    """
    screen, aligned = out(), set(right)
    cells = [[cell if isinstance(cell, Text) else Text("-" if cell is None else _cell(cell)) for cell in row]
             for row in rows]  # fmt: skip
    widths, space = _layout(columns, cells, aligned, screen.width)
    grid = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False,
                 padding=(0, space, 0, 0))  # fmt: skip
    for number, (column, width) in enumerate(zip(columns, widths, strict=True)):
        side: JustifyMethod = "right" if column in aligned else "left"
        grid.add_column(column, justify=side, header_style="bold", overflow="fold", no_wrap=number == 0, width=width)
    for row in cells:
        grid.add_row(*row)
    with screen.capture() as lines:
        screen.print(grid)
    screen.file.write("".join(f"{line.rstrip()}\n" for line in lines.get().splitlines()))


def _layout(
    columns: Sequence[str], cells: Sequence[Sequence[Text]], numbers: Collection[str], room: int
) -> tuple[list[int | None], int]:
    """Return the width of each column, None where Rich may choose it, and how many spaces stand between them."""

    def longest(place: int, header: int) -> int:
        return max([header, *(row[place].cell_len for row in cells)])

    words = [max(map(len, name.split()), default=0) for name in columns]
    least = [word if place and name not in numbers else longest(place, word)
             for place, (name, word) in enumerate(zip(columns, words, strict=True))]  # fmt: skip
    whole = [max(len(name), width) for name, width in zip(columns, least, strict=True)]
    gaps = 2 * (len(columns) - 1)
    if sum(whole) + gaps <= room:
        return [None] * len(columns), 2
    widths = [width if name in numbers else None for name, width in zip(columns, least, strict=True)]
    return widths, 2 if sum(least) + gaps <= room else 1


def _cell(value: Any) -> str:
    return "\n".join(plain(line) for line in str(value).split("\n"))


def mark(good: bool | None) -> Text:
    """`yes`, `no` or `-`."""
    return Text("-") if good is None else Text("yes", style="ok") if good else Text("no", style="bad")


def size(count: float | None) -> str:
    """Bytes for people: `11.2 MB`."""
    if count is None:
        return "unknown"
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def count(number: int) -> str:
    """Say how many, for people: `512`, `10.4 M`, `15.7 G`."""
    for unit, size in (("G", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number:,}"


def estimate(seconds: float | None) -> str | None:
    """Format seconds that are foreseen, no finer than they are known: `45 s`, `7 min`, `2.1 h`."""
    if seconds is None:
        return None
    if seconds < 59.5:
        return duration(seconds)
    return f"{seconds / 60:.0f} min" if seconds < 3570 else f"{seconds / 3600:.1f} h"


def duration(seconds: float | None) -> str:
    """Seconds for people: `45 s`, `3 min 20 s`, `12 min`, `2 h 05 min`."""
    if seconds is None:
        return "unknown"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s" if whole < 600 else f"{whole // 60} min"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


class StageProgress:
    """Progress of the stages of a run: `start`, then `update` with work done so far, then `finish`."""

    def start(self, name: str, number: int, total: int) -> None:
        """Stage `number` of `total` begins."""

    def update(self, done: int, total: int, text: str) -> None:
        """`done` of `total` units of the stage's work are finished."""

    def tell(self, text: str) -> None:
        """Show a decision of the stage, once."""

    def finish(self, name: str, text: str) -> None:
        """Mark the stage as done, or as done before."""


class Pace:
    """Time left at the rate of the second half of this run, which tells what the machine gives now.

    A run is timed from its first count on, so that neither loading nor what an earlier run has done changes it; in the
    first minute all of it counts. A smaller count than the last begins anew.
    """

    SETTLED = 60.0  # seconds

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = (0.0, 0)
        self._counts: deque[tuple[float, int]] = deque()  # of the second half, and the last one before it

    def left(self, done: int, total: int) -> float | None:
        """Take a count; return the seconds left, None before anything is done."""
        now = self._clock()
        if not self._counts or done < self._counts[-1][1]:
            self._began = (now, done)
            self._counts.clear()
        if not self._counts or done > self._counts[-1][1]:
            self._counts.append((now, done))
        taken = now - self._began[0]
        while taken > self.SETTLED and len(self._counts) > 1 and self._counts[1][0] <= now - taken / 2:
            self._counts.popleft()
        since, first = self._counts[0] if self._counts[0][1] < done else self._began
        new = done - first
        return (now - since) / new * (total - done) if new else None


class _PlainProgress(StageProgress):
    """One line now and then, for logs."""

    SECONDS = 10.0

    def __init__(self) -> None:
        self._shown = 0.0
        self._name, self._pace = "", Pace()

    def start(self, name: str, number: int, total: int) -> None:
        self._name, self._pace = name, Pace()
        self._shown = time.monotonic()
        note(f"[{number}/{total}] {name}")

    def update(self, done: int, total: int, text: str) -> None:
        left, now = self._pace.left(done, total), time.monotonic()
        if now - self._shown < self.SECONDS or left is None or done >= total:
            return
        self._shown = now
        note(f"  {self._name} {100 * done // total}%, {text} ({duration(left)} left)")

    def tell(self, text: str) -> None:
        note(f"  {text}")

    def finish(self, name: str, text: str) -> None:
        note(f"  {name}: {text}")


class _LiveProgress(StageProgress):
    """A bar for the stage that runs, a line for each that is done."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._pace = progress, Pace()
        self._task = progress.add_task("", total=None, name="", note="", left="")

    def start(self, name: str, number: int, total: int) -> None:
        self._pace = Pace()
        self._progress.reset(self._task, total=None, name=f"[{number}/{total}] {name}"[:32], note="", left="")

    def update(self, done: int, total: int, text: str) -> None:
        seconds = self._pace.left(done, total)
        left = "" if seconds is None else f"{duration(seconds)} left"
        self._progress.update(self._task, completed=done, total=total, note=plain(text)[:24], left=left)

    def tell(self, text: str) -> None:
        self._progress.console.print(Text(f"  {plain(text)}", style="quiet"), soft_wrap=True)

    def finish(self, name: str, text: str) -> None:
        self._progress.console.print(Text.assemble(("  ✓ ", "ok"), (name, "name"), f" {plain(text)}"), soft_wrap=True)


@contextmanager
def progress(quiet: bool = False) -> Iterator[StageProgress]:
    """Show the progress of a run: bars on a terminal, plain lines elsewhere, nothing when `quiet`."""
    if quiet:
        yield StageProgress()
    elif not sys.stderr.isatty():
        yield _PlainProgress()
    else:
        columns = (
            TextColumn("{task.fields[name]}", style="name"),
            BarColumn(bar_width=14),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}", style="quiet"),
            TextColumn("{task.fields[note]}", style="quiet"),
        )
        with Progress(*columns, console=err(), transient=True, refresh_per_second=4) as bars:
            yield _LiveProgress(bars)

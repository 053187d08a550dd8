"""Progress of a stage that goes through the blocks several times, in units of time, so that the time left is right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence

from deepseek_compress.planning.costs import Rates

Progress = Callable[[int, int, str], None]
PARTS = 1000  # of the whole stage
# Of a machine that was not measured. Only the ratios matter here.
USUAL = Rates(
    products=1e11, products_one_core=5e10, touched=8e9, solved_one_core=3e7, packed_one_core=2e8,
    read=1e9, written=5e8, start=1.0,
)  # fmt: skip


class Passes:
    """`seconds`: pass -> the time of each of its steps, in the order of the passes."""

    def __init__(self, progress: Progress, seconds: Mapping[str, Sequence[float]]) -> None:
        self._progress, self._seconds = progress, seconds
        self._total = sum(map(sum, seconds.values())) or 1.0

    def of(self, name: str) -> Progress:
        """Return the progress of one pass; of one that was not foreseen, the stage's own."""
        if name not in self._seconds:
            return self._progress
        names, steps = list(self._seconds), self._seconds[name]
        before = sum(sum(self._seconds[other]) for other in names[: names.index(name)])

        def progress(done: int, total: int, note: str) -> None:
            part = sum(steps[:done]) if total == len(steps) else sum(steps) * done / total
            self._progress(round(PARTS * (before + part) / self._total), PARTS, note)

        return progress


class Steps:
    """`seconds`: the time of each step; parts of the step that runs may be counted before it is done."""

    def __init__(self, progress: Progress, seconds: Sequence[float], note: str) -> None:
        self._progress, self._note, self._total = progress, note, sum(seconds) or 1.0
        self._ends = iter(itertools.accumulate(seconds))
        self._now = 0.0
        self._say()

    def part(self, seconds: float) -> None:
        """Count a part of the step that runs."""
        self._now += seconds
        self._say()

    def done(self) -> None:
        """Count the rest of the step that runs."""
        self._now = next(self._ends)
        self._say()

    def _say(self) -> None:
        self._progress(round(PARTS * self._now / self._total), PARTS, self._note)

"""How far the answers are and how long the rest will take, from what this run itself has answered."""

from __future__ import annotations

import time
from collections.abc import Callable


class TimeLeft:
    """Call it with every count; answers that an earlier run gave tell nothing of this one's speed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began: tuple[float, int] | None = None  # when, and how many there were

    def __call__(self, done: int, total: int) -> str:
        """`320 of 1000, 4 min left`."""
        now = self._clock()
        if self._began is None:
            self._began = (now, done)
        new, words = done - self._began[1], f"{done} of {total}"
        if not new or done == total:
            return words
        return f"{words}, {spoken((now - self._began[0]) / new * (total - done))} left"


def spoken(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`: no more figures than are known."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

"""Progress of the answers and the time left, from this run's own rate."""

from __future__ import annotations

import time
from collections.abc import Callable

from deepseek_compress.console import Pace


class TimeLeft:
    """Call it with every count; answers that an earlier run gave tell nothing of this one's speed."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._pace = Pace(clock)

    def __call__(self, done: int, total: int) -> str:
        """`320 of 1000, 4 min left`."""
        left, words = self._pace.left(done, total), f"{done} of {total}"
        return words if left is None or done == total else f"{words}, {spoken(left)} left"


def spoken(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`: no more figures than are known."""
    if seconds < 90:
        return f"{max(seconds, 1):.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

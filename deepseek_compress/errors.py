"""The one exception the user sees: what is wrong, the values that disagree, the next step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class DscError(Exception):
    """Something the user can fix.

    `what` names the thing and the values that disagree; `fix` is the next step to take. The command line prints
    `error: WHAT; FIX` on one line and exits 1. Anything that is not a `DscError` is a defect of ours.
    """

    def __init__(self, what: str, fix: str = "") -> None:
        self.what = what
        self.fix = fix
        super().__init__(f"{what}; {fix}" if fix else what)

    def __reduce__(self) -> tuple[Any, ...]:
        return DscError, (self.what, self.fix)  # what a worker process raises arrives whole


class Problems(DscError):
    """Several mistakes found at one door, reported together, each as its own line."""

    def __init__(self, problems: Iterable[DscError | str]) -> None:
        self.problems = [p if isinstance(p, DscError) else DscError(p) for p in problems]
        super().__init__("\n".join(str(p) for p in self.problems))

    def __reduce__(self) -> tuple[Any, ...]:
        return Problems, (self.problems,)


def raise_problems(problems: Iterable[DscError | str]) -> None:
    """Raise `Problems` if there is at least one; do nothing otherwise."""
    found = list(problems)
    if found:
        raise Problems(found)

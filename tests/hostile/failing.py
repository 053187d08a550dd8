"""Calls of the operating system that create, rename, sync, cut or remove, counted: at one of them the process dies, or
the call fails once as on a full disk."""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CALLS = ("replace", "rename", "mkdir", "fsync", "unlink", "rmdir", "ftruncate")
KILLED = 137


class Fault(NamedTuple):
    """`after` so many calls the process ends (`dies`), or the last of them raises; 0: never. `told`: their count."""

    after: int
    told: Path | None = None
    dies: bool = True

    def install(self) -> None:
        """Count from now on, in this process."""
        counted = _Counted(self)
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        os.open = counted(os.open, lambda path, flags, *more, **named: bool(flags & os.O_CREAT))
        builtins.open = io.open = counted(counted.open, _opens_to_write)


class _Counted:
    """Wraps calls, all of which count together."""

    def __init__(self, fault: Fault) -> None:
        self.fault, self.count, self.open = fault, 0, builtins.open

    def __call__(self, call: Callable[..., Any], counts: Callable[..., bool] = lambda *a, **k: True) -> Any:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            if not counts(*arguments, **named):
                return call(*arguments, **named)
            due = self.count + 1 == self.fault.after
            if due and not self.fault.dies:
                self.count += 1
                place = arguments[0] if isinstance(arguments[0], (str, os.PathLike)) else None
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)
            result = call(*arguments, **named)  # one that fails by itself does not count
            self.count += 1
            if due:
                os._exit(KILLED)
            if self.fault.told is not None:
                with self.open(self.fault.told, "w") as file:
                    file.write(str(self.count))
            return result

        return wrapped


def _opens_to_write(file: Any, mode: str = "r", *more: Any, **named: Any) -> bool:
    return not isinstance(file, int) and any(letter in mode for letter in "wax")

"""The one place that starts Python processes: none of them imports anything from the directory it is started in.

A checkpoint may hold a file `torch.py`. `python -m` and `python -c` put the current directory first on the path, and so
do the fork server and the resource tracker of multiprocessing; PYTHONSAFEPATH (Python 3.11) says not to, and an empty
or relative entry of PYTHONPATH, which means the same directory, is left out.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

ROOT = Path(__file__).resolve().parents[1]  # where this package is found


def environment() -> dict[str, str]:
    """Environment of a Python process that finds this package and nothing in the current directory."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys([str(ROOT), *(path for path in given if _trusted(path))])
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS`, its output captured."""
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment())


def leave_directory() -> None:
    """Take the current directory off this process's path, unless this package itself lies there."""
    sys.path[:] = [path for path in sys.path if _trusted(path)]


@contextmanager
def safe_environment() -> Iterator[None]:
    """Inside, what multiprocessing starts has `environment()`."""
    before = {name: os.environ.get(name) for name in ("PYTHONSAFEPATH", "PYTHONPATH")}
    os.environ.update(environment())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM wait: a process that is started half reads half a pickle and says so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
    for received in came:
        signal.raise_signal(received)


def _trusted(path: str) -> bool:
    """Whether an entry of a Python path names a directory of its own, not the one somebody happens to be in."""
    if not os.path.isabs(path):
        return False
    try:
        here = os.path.samefile(path, os.getcwd())
    except OSError:
        here = False
    return not here or Path(path).resolve() == ROOT

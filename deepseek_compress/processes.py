"""The one place that starts processes: none of them imports anything from the directory it is started in.

A checkpoint may hold a file `torch.py`. `python -m` and `python -c` put the current directory first on the path, and so
do the fork server and the resource tracker of multiprocessing; PYTHONSAFEPATH (Python 3.11) says not to, and an empty
or relative entry of PYTHONPATH, which means the same directory, is left out.
"""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager, suppress

TYPE_CHECKING = False  # what else is needed is imported where it is: `python -m` has the current directory on the path
if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Iterator, Sequence
    from concurrent.futures import Future
    from multiprocessing.connection import Connection
    from multiprocessing.queues import SimpleQueue
    from types import FrameType
    from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))  # where this package is found


def environment() -> dict[str, str]:
    """Environment of a Python process that finds this package and nothing in the current directory."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = dict.fromkeys([ROOT, *(path for path in given if _trusted(path))])
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(paths)}


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python ARGUMENTS`, its output captured."""
    import subprocess

    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, env=environment())


def start_python(*arguments: str, **pipes: Any) -> subprocess.Popen[Any]:
    """Start `python ARGUMENTS` with its input and output as pipes; `pipes`: see `Popen`."""
    import subprocess

    return subprocess.Popen(
        [sys.executable, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment(), **pipes
    )


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


class Workers:
    """Processes of a fork server: it imports `preload` once, and the workers share its pages.

    begin: called first in each of them, with `arguments` and one of `own` that no other gets. A worker is deaf to
    Ctrl-C, which the terminal sends to all, since this process ends its workers; and it ends with this process.
    """

    def __init__(
        self,
        count: int,
        preload: Sequence[str],
        begin: Callable[..., None] | None = None,
        arguments: Sequence[Any] = (),
        own: Sequence[Any] = (),
    ) -> None:
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(preload))
        alive, self._alive = context.Pipe(duplex=False)  # whose other end tells the workers that this process ended
        with safe_environment():  # its locks start the resource tracker
            left = context.SimpleQueue()
            for each in own:
                left.put(each)
            self._pool = ProcessPoolExecutor(count, context, _begin, (begin, alive, arguments, left))

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Start `function(*arguments)`; the first calls start the processes."""
        with safe_environment(), undisturbed(), _without_main():
            return self._pool.submit(function, *arguments)

    def kill(self) -> None:
        """End the workers at once, whatever they compute."""
        for process in list((self._pool._processes or {}).values()):
            process.kill()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._alive.close()


@contextmanager
def _without_main() -> Iterator[None]:
    """Inside, what multiprocessing starts does not run the caller's script again, which need not guard its work.

    It would for the sake of functions that are defined there; ours are all of modules.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = type(sys)("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _begin(
    begin: Callable[..., None] | None, alive: Connection, arguments: Sequence[Any], own: SimpleQueue[Any]
) -> None:
    """Set up a worker process."""
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with(alive)
    if begin is not None:
        begin(*arguments, own.get())


def lost() -> tuple[type[Exception], ...]:
    """Return the exceptions of a killed worker (the first) and of a lost fork server (the others)."""
    from concurrent.futures.process import BrokenProcessPool

    return BrokenProcessPool, ConnectionError, EOFError


def stop_server() -> None:
    """End the fork server and wait, so that the time of its workers counts as this run's."""
    from multiprocessing import forkserver

    forkserver._forkserver._stop()  # type: ignore[attr-defined]


@contextmanager
def one_server() -> Iterator[None]:
    """Inside, the fork server of the first `Workers` serves all that come; afterwards it is ended."""
    try:
        yield
    finally:
        stop_server()


def _end_with(alive: Connection) -> None:
    """End this process at once when nobody holds the other end of `alive` any more, whatever it computes.

    The fork server does not see to it: its workers hold the pipe by which it would notice.
    """

    import threading

    def wait() -> None:
        with suppress(EOFError, OSError):
            alive.recv_bytes()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Inside, Ctrl-C and SIGTERM wait: a process that is started half reads half a pickle and says so."""
    import signal
    import threading

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
    return not here or os.path.realpath(path) == ROOT

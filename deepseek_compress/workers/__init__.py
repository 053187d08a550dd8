"""Where tasks are computed: in this process, in worker processes, or on a Ray cluster.

    with open_pool(shared, count) as pool:
        for result in pool.run(function, tasks): ...      # function(shared, task), results in the order of `tasks`

A task computes with one thread and knows nothing of the others, so who computes it changes no bytes. A worker that is
lost (killed, out of memory, its node gone) loses nothing but time: its task is computed again. `function` is a function
of a module; `shared`, tasks and results travel by pickle, between processes of one run alone.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any, Protocol, TypeVar

from deepseek_compress import machine, processes
from deepseek_compress.errors import DscError

Task = TypeVar("Task")
Result = TypeVar("Result")
Handle = TypeVar("Handle")  # of a task that was started
ATTEMPTS = 3  # times a task may lose its worker
AHEAD = 2  # results that may wait for an earlier one, besides one a worker


class Pool(Protocol):
    """Computes tasks."""

    @property
    def count(self) -> int:
        """Tasks that are computed at a time."""
        ...

    @property
    def here(self) -> bool:
        """Whether this process computes them, so that they find what it holds."""
        ...

    def run(self, function: Callable[[Any, Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """`function(shared, task)` for each task; results in the order of the tasks."""
        ...


class Place(Protocol):
    """Resource that a worker has for itself, a GPU; travels by pickle."""

    def begin(self, shared: Any) -> Any:
        """Return `shared` as the worker's tasks are given it; called once in each worker."""
        ...

    def computing(self) -> AbstractContextManager[None]:
        """Inside a task is computed."""
        ...


@contextmanager
def open_pool(
    shared: Any, count: int = 1, ray: str | None = None, memory: int = 0, places: Sequence[Place] = ()
) -> Iterator[Pool]:
    """`count` processes here, or with `ray` (an address, "auto") every core of that cluster.

    memory: bytes that a task needs besides the libraries; Ray places tasks by it. places: one process for each instead;
    with Ray there is one, what a task finds in its worker, where it has a GPU to itself.
    """
    if ray is not None:
        from deepseek_compress.workers.cluster import RayPool

        with RayPool(shared, ray, 0 if places else memory, *places) as cluster:
            yield cluster
    elif count > 1 or len(places) > 1:
        with _Processes(shared, count, places) as processes:
            yield processes
    else:
        yield _Inline(shared)


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes with one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def in_order(
    tasks: Iterable[Task], submit: Callable[[Task], Handle], fetch: Callable[[Handle], Result], count: int
) -> Iterator[Result]:
    """Yield the results of `fetch` in the order of the tasks; `submit` starts little more than `count` at a time.

    So results that wait for an earlier one are few, whatever their size.
    """
    coming = iter(tasks)
    waiting = deque(submit(task) for task in itertools.islice(coming, count + AHEAD))
    while waiting:
        result = fetch(waiting.popleft())
        waiting.extend(submit(task) for task in itertools.islice(coming, 1))
        yield result


def become_worker() -> None:
    """Compute with one thread in this process, and reuse what it frees."""
    import torch

    torch.set_num_threads(1)
    machine.settle()


def compute(function: Callable[[Any, Task], Result], shared: Any, task: Task) -> Result:
    """`function(shared, task)`, without gradients."""
    import torch

    with torch.no_grad():
        return function(shared, task)


class _Inline:
    """This process."""

    count, here = 1, True

    def __init__(self, shared: Any) -> None:
        self._shared = shared

    def run(self, function: Callable[[Any, Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        for task in tasks:
            with one_thread():
                result = compute(function, self._shared, task)
            yield result


class _Processes:
    """Worker processes: `count`, or one for each of `places`."""

    here = False

    def __init__(self, shared: Any, count: int, places: Sequence[Place] = ()) -> None:
        self._shared, self.count, self._places = shared, len(places) or count, places
        self._workers: processes.Workers | None = None

    def run(self, function: Callable[[Any, Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        done = lost = 0
        while done < len(tasks):
            try:
                for result in self._ordered(function, tasks[done:]):
                    done, lost = done + 1, 0
                    yield result
            except processes.lost():
                lost += 1
                self._stop()
                if lost == ATTEMPTS:
                    what = f"a worker process was killed {ATTEMPTS} times at the same task (out of memory?)"
                    raise DscError(what, "give fewer --workers; run the same command again to resume") from None

    def _ordered(self, function: Callable[[Any, Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        if self._workers is None:
            own: Sequence[Place | None] = self._places or [None] * self.count
            self._workers = processes.Workers(self.count, [__name__, *_PRELOAD], _begin, [self._shared], own)
        workers = self._workers
        return in_order(tasks, lambda task: workers.submit(_compute, function, task), Future.result, self.count)

    def _stop(self) -> None:
        if self._workers is not None:
            self._workers.kill()
            self._workers = None

    def __enter__(self) -> _Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()
        processes.stop_server()


_PRELOAD = ("deepseek_compress.compress.convert",)  # what tasks import
_given: list[Any] = []  # in a worker: what its tasks share, and its place


def _begin(shared: Any, place: Place | None) -> None:
    """Make this process a worker: one thread, and what its tasks share."""
    become_worker()
    _given[:] = [shared, place]


_begun: dict[Place, Any] = {}  # in a worker: what its place made of what is shared


def _compute(function: Callable[[Any, Task], Result], task: Task) -> Result:
    shared, place = _given
    try:
        if place is None:
            return compute(function, shared, task)
        if place not in _begun:  # not in `_begin`, whose error nobody would see
            _begun[place] = place.begin(shared)
        with place.computing():
            return compute(function, _begun[place], task)
    finally:
        # What is kept falls into pieces from task to task, and would stay while the run itself needs memory
        machine.return_freed_memory()

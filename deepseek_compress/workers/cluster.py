"""Tasks on a Ray cluster whose nodes all see the model and the output under the same paths.

Ray computes a task again when its worker or node is lost. `shared` travels once to each node and is unpacked once in
each worker. Source: Ray Core, "Tasks" and "Task fault tolerance".
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from types import TracebackType
from typing import Any

from deepseek_compress.errors import DscError
from deepseek_compress.processes import ROOT
from deepseek_compress.workers import Place, Result, Task, become_worker, compute, in_order
from deepseek_compress.workers.address import FIX, reach

RETRIES = 5  # times a task may lose its worker


class RayPool:
    """Every core of the cluster at `address`; a task takes one core and `memory` bytes.

    With a `place` every GPU of it, and a task takes one, which is the only GPU that its worker sees.
    """

    here = False

    def __init__(self, shared: Any, address: str, memory: int, place: Place | None = None) -> None:
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # errors are raised too: one line is enough
        try:
            import ray
        except ImportError:
            raise DscError("--ray: ray is not installed", "pip install 'deepseek-compress[ray]'") from None
        self._ray = ray
        reach(address)
        try:
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # it would report, and ask clouds where it runs
            with contextlib.chdir(ROOT):  # Ray puts the current directory on the path of its workers
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except (OSError, ValueError, RuntimeError) as error:
            what = f"--ray {address}: {str(error).splitlines()[0]}"
            raise DscError(what, FIX) from None
        self.count = int(ray.cluster_resources().get("GPU" if place else "CPU", 0))
        if not self.count:
            ray.shutdown()
            what = f"--ray {address}: the cluster has no {'GPU' if place else 'CPU'}"
            raise DscError(what, "add a node that has one, or use --device cpu" if place else "add a node")
        largest = max((node["Resources"].get("memory", 0) for node in ray.nodes() if node["Alive"]), default=0)
        if memory > largest:
            ray.shutdown()  # such a task would wait for ever
            needs, offers = f"{memory / 1e9:.1f} GB", f"{largest / 1e9:.1f} GB"
            what = f"--ray {address}: a task needs {needs}, the largest node offers {offers}"
            raise DscError(what, "add a larger node, or leave --ray out")
        self._shared, self._place = ray.put(shared), place
        self._options = {"num_cpus": 1, "max_retries": RETRIES, **({"memory": memory} if memory else {})}
        self._options |= {"num_gpus": 1} if place else {}

    def run(self, function: Callable[[Any, Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
        """`function(shared, task)` for each task; results in the order of the tasks."""
        remote = self._ray.remote(_compute).options(**self._options)
        # In a list a reference stays a reference: the worker fetches the object itself, once
        shared = ([self._shared], self._place)
        return in_order(tasks, lambda task: remote.remote(function, *shared, task), self._fetch, self.count)

    def _fetch(self, reference: Any) -> Any:
        ray = self._ray
        try:
            return ray.get(reference)
        except ray.exceptions.RayTaskError as error:
            raise error.cause if isinstance(error.cause, DscError) else error from None
        except ray.exceptions.RayError as error:
            what = f"--ray: {str(error).splitlines()[0]}"
            raise DscError(what, "see `ray status`; run the same command again to resume") from None

    def __enter__(self) -> RayPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ray.shutdown()


_given: dict[str, Any] = {}  # in a worker: what its tasks share, by reference


def _compute(function: Callable[[Any, Task], Result], shared: list[Any], place: Place | None, task: Task) -> Result:
    import ray

    key = shared[0].hex()
    if key not in _given:
        _given.clear()
        given = ray.get(shared[0])
        _given[key] = given if place is None else place.begin(given)
        become_worker()
    with nullcontext() if place is None else place.computing():
        return compute(function, _given[key], task)

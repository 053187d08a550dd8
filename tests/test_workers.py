"""Pools: results in order, errors whole, a lost worker's tasks computed again, the same bytes whoever computes."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.compress.convert import convert
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.selection import CHANGEABLE, select
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.errors import DscError, Problems
from deepseek_compress.models import Architecture
from deepseek_compress.numerics import WEIGHTS
from deepseek_compress.workers import Pool, open_pool

FEW = torch.randint(2, 512, (6, 64), generator=torch.Generator().manual_seed(5))
METHODS = {"rtn": {"group_size": 32}, "gptq": {"group_size": 32}, "gptaq": {"group_size": 32}}


def twice(shared: int, task: int) -> tuple[int, int]:
    time.sleep(0.02 * (task % 3))  # so that they end in another order
    return shared * task, torch.get_num_threads()


def failing(shared: int, task: int) -> int:
    raise Problems([DscError("one", "mend it"), DscError("two")]) if task == 2 else DscError("never")


def dying(shared: Path, task: int) -> int:
    """Kills its process at task 3, as often as the file `shared` has digits left."""
    if task == 3 and shared.read_text():
        shared.write_text(shared.read_text()[1:])
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def test_results_come_in_order_from_one_thread_each() -> None:
    for count in (1, 2):
        with open_pool(10, count) as pool:
            assert pool.count == count
            assert list(pool.run(twice, list(range(7)))) == [(10 * i, 1) for i in range(7)]


def test_errors_arrive_whole() -> None:
    with open_pool(0, 2) as pool, pytest.raises(Problems) as caught:
        list(pool.run(failing, [2]))
    assert [(problem.what, problem.fix) for problem in caught.value.problems] == [("one", "mend it"), ("two", "")]


def test_tasks_of_a_killed_worker_are_computed_again(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    lives.write_text("xx")
    with open_pool(lives, 2) as pool:
        assert list(pool.run(dying, list(range(6)))) == list(range(6))


def test_a_task_that_always_kills_its_worker_is_one_line(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    lives.write_text("x" * 9)
    with open_pool(lives, 2) as pool, pytest.raises(DscError, match="killed 3 times"):
        list(pool.run(dying, list(range(6))))


def job_of(model: Path, out: Path, method: str) -> Job:
    source = open_checkpoint(model)
    architecture = Architecture.of(source)
    weights = WEIGHTS[method].model_validate(METHODS[method])
    chosen = select(architecture, frozenset(CHANGEABLE), weights)
    return Job(architecture, LinearSolver(chosen, None, weights, 4), out / ".dsc_blocks")


def compress(
    model: Path,
    out: Path,
    method: str,
    pool_of: Callable[[Job], AbstractContextManager[Pool]],
    progress: Callable[[int, int, str], None] = lambda done, total, note: None,
) -> dict[str, bytes]:
    job = job_of(model, out, method)
    with CheckpointWriter(out, job.source, resume=True) as writer, pool_of(job) as pool:
        convert(job, writer, pool, FEW if job.solver.needs else None, progress)
        writer.finish({}, {}, [])
    return {file.name: file.read_bytes() for file in sorted(out.iterdir()) if file.is_file()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deepseek_compress.compress.data_free.SMALLEST", 100_000)


@pytest.mark.usefixtures("small_shards")
@pytest.mark.parametrize("method", METHODS)
def test_one_worker_or_two_write_the_same_bytes(method: str, tiny_v3: Path, tmp_path: Path) -> None:
    alone = compress(tiny_v3, tmp_path / "1", method, lambda job: open_pool(job))
    assert compress(tiny_v3, tmp_path / "2", method, lambda job: open_pool(job, 2)) == alone
    assert method != "rtn" or len(alone) > 4, "several shards"


NODE = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 80_000_000}  # the GPU is claimed, there need be none


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A real cluster on this machine: two nodes of one core each, which claim a GPU."""
    utils = pytest.importorskip("ray.cluster_utils", reason="ray is not installed")
    running = utils.Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    running.add_node(**NODE)
    yield running
    running.shutdown()


@pytest.mark.slow
def test_ray_hands_out_its_gpus(cluster: Any) -> None:
    with open_pool("it", ray=cluster.address, places=[Seen("cuda:0")]) as pool:
        assert pool.count == 2
        assert list(pool.run(gpus, ["a", "b", "c"])) == [1, 1, 1]


@pytest.mark.verify
def test_ray_reports_nothing_and_its_workers_import_nothing_from_here(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage_lib = pytest.importorskip("ray._common.usage.usage_lib")

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "planted.py").write_text("")
    with open_pool("planted", ray=cluster.address) as pool:
        assert not usage_lib.usage_stats_enabled()
        assert list(pool.run(importable, ["a", "b"])) == [False, False]


def importable(shared: str, task: str) -> bool:
    return importlib.util.find_spec(shared) is not None


def gpus(shared: str, task: str) -> int:
    """How many GPUs Ray gave to this task."""
    import ray

    return len(ray.get_gpu_ids())


@pytest.mark.slow
@pytest.mark.usefixtures("small_shards")
def test_ray_writes_the_same_bytes_also_when_a_node_is_lost(cluster: Any, tiny_v3: Path, tmp_path: Path) -> None:
    with open_pool(0, ray=cluster.address) as pool:
        assert pool.count == 2
        with pytest.raises(DscError, match="two"):
            list(pool.run(failing, [2]))
    with pytest.raises(DscError, match="the largest node offers"), open_pool(0, ray=cluster.address, memory=10**15):
        pass
    for method in ("rtn", "gptq"):
        alone = compress(tiny_v3, tmp_path / method, method, lambda job: open_pool(job))
        lost: list[Any] = [node for node in cluster.list_all_nodes() if not node.head]

        def kill_one(done: int, total: int, note: str, lost: list[Any] = lost) -> None:
            if 0 < done < total and lost:  # once the first task is done
                cluster.remove_node(lost.pop(), allow_graceful=False)

        out = tmp_path / f"{method}-ray"
        assert compress(tiny_v3, out, method, lambda job: open_pool(job, ray=cluster.address), kill_one) == alone
        assert not lost
        cluster.add_node(**NODE)


class Seen(NamedTuple):
    """A place that says what it was asked."""

    name: str

    def begin(self, shared: str) -> str:
        return f"{shared} at {self.name}"

    def computing(self) -> AbstractContextManager[None]:
        return nullcontext()


def told(shared: str, task: int) -> str:
    return f"{task}: {shared}"


class FakeRay:
    """What `RayPool` asks of Ray, in this process: tasks run where they are started."""

    class exceptions:
        RayError = type("RayError", (Exception,), {})
        RayTaskError = type("RayTaskError", (RayError,), {})

    def __init__(self, **resources: float) -> None:
        self.resources, self.asked = resources, {}  # type: ignore[var-annotated]
        self.init = self.shutdown = lambda *a, **b: None

    def cluster_resources(self) -> dict[str, float]:
        return self.resources

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": {"memory": 1e9}}]

    def put(self, value: Any) -> Any:
        return Held(value)

    def get(self, value: Any) -> Any:
        return value.value

    def remote(self, function: Any) -> Any:
        def options(**asked: Any) -> Any:
            self.asked = asked
            return SimpleNamespace(remote=lambda *arguments: Held(function(*arguments)))

        return SimpleNamespace(options=options)


class Held(NamedTuple):
    value: Any

    def hex(self) -> str:
        return str(id(self.value))


def test_a_task_of_a_cluster_has_a_gpu_to_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs count, not cores; what a task needs is a GPU's memory, not a node's."""
    ray = FakeRay(CPU=64.0, GPU=3.0)
    monkeypatch.setitem(sys.modules, "ray", ray)
    with open_pool("it", ray="auto", memory=10**15, places=[Seen("cuda:0")]) as pool:
        assert (pool.count, pool.here) == (3, False)
        assert list(pool.run(told, [4, 5])) == ["4: it at cuda:0", "5: it at cuda:0"]
    assert ray.asked == {"num_cpus": 1, "max_retries": 5, "num_gpus": 1}
    with open_pool("other", ray="auto") as pool:
        assert (pool.count, list(pool.run(told, [4]))) == (64, ["4: other"])
    assert "num_gpus" not in ray.asked


def test_a_cluster_without_a_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", FakeRay(CPU=64.0))
    wanted = open_pool("it", ray="auto", places=[Seen("cuda:0")])
    with pytest.raises(DscError, match="the cluster has no GPU; add a node that has one"), wanted:
        pass


def test_ray_that_is_not_installed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    wanted = open_pool("it", ray="auto", places=[Seen("cuda:0")])
    with pytest.raises(DscError, match=r"ray is not installed; pip install 'deepseek-compress\[ray\]'"), wanted:
        pass


def test_a_cluster_that_is_not_there_is_one_line() -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    with pytest.raises(DscError, match=r"--ray 127\.0\.0\.1:1"), open_pool(0, ray="127.0.0.1:1"):
        pass

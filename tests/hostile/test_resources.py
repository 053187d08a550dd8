"""What the machine takes away: a fork server, descriptors, room in files and in shared memory."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from harness import dsc, faults, loads, warm
from windows import contents, run, uninterrupted, words_of

from deepseek_compress.workers import open_pool


def waiting(folder: Path, task: int) -> int:
    """Task 1 waits until the other end has done its work."""
    (folder / str(task)).touch()
    deadline = time.monotonic() + 60
    while task == 1 and not (folder / "killed").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return task


def test_a_killed_fork_server_costs_nothing_but_time(tmp_path: Path) -> None:
    from multiprocessing import forkserver

    def kill() -> None:
        while not (tmp_path / "1").exists():
            time.sleep(0.01)
        os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]
        (tmp_path / "killed").touch()

    with open_pool(tmp_path, 2) as pool:
        thread = threading.Thread(target=kill)
        thread.start()
        assert list(pool.run(waiting, list(range(8)))) == list(range(8))
        thread.join()


@pytest.mark.parametrize("name", [pytest.param("data-free", marks=pytest.mark.verify), "gguf", "onnx", "calibrate"])
def test_files_that_may_not_grow(name: str, given: Path, tmp_path: Path) -> None:
    """A write fails in the middle: one line, nothing that loads, and the same command goes on."""
    expected, _ = uninterrupted(name, given, tmp_path)
    largest = max(map(len, expected.values()))
    here = tmp_path / "here"
    here.mkdir()
    words = words_of(name, given)
    limit = (largest * 2 // 3, resource.RLIM_INFINITY)
    found = dsc(here, *words, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit))
    assert faults(found, "too large") == []
    assert found.code == 1
    assert not loads(here)
    assert run(name, given, here).code == 0
    assert contents(here) == expected


@pytest.mark.verify
@pytest.mark.parametrize("count", [12, 24])
def test_few_descriptors(count: int, given: Path, tmp_path: Path) -> None:
    warm()
    words = words_of("text", given)

    def limit() -> None:
        most = count + len(os.listdir("/proc/self/fd"))  # beside those that this process has open already
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    found = dsc(tmp_path, *words, "--workers", "2", before=limit)
    assert faults(found) == []


@pytest.mark.verify
def test_shared_memory_that_is_full(given: Path, tmp_path: Path) -> None:
    script = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && dd if=/dev/zero of=/dev/shm/fill bs=4k count=1; "$@"'
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no mount namespaces here")
    words = words_of("text", given)
    command = [sys.executable, "-P", "-m", "deepseek_compress", *words, "--workers", "2"]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", *command],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 0 or "error: " in done.stderr

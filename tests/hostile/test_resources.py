"""What the machine takes away: a fork server that is killed makes no difference."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

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

"""What the machine refuses: files that may not grow, few file handles, no shared memory, a fork server that is gone.

One line and exit 1, and the same command goes on when there is room; or no difference at all.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import Outcome, dsc, faults, loads, warm

from deepseek_compress.workers import open_pool

ROOT = Path(__file__).parents[2]
GROUP, TEXT = ["--group-size", "32"], ["--samples", "4", "--length", "32"]
COMMANDS = {
    "data-free": ["quantize", "MODEL", "-o", "out", "-r", "w4a16-fast", *GROUP],
    "text": ["quantize", "MODEL", "-o", "out", "-r", "w4a16", *GROUP, *TEXT],
    "bf16": ["export", "MODEL", "-o", "out", "--target", "bf16"],
    "gguf": ["export", "MODEL", "-o", "out", "--target", "gguf"],
    "onnx": ["export", "MODEL", "-o", "out", "--target", "onnx", "--set", "verify=false"],
    "calibrate": ["calibrate", "MODEL", "-o", "out", *TEXT],
    "distill": ["distill", "MODEL", "-o", "out", "--cache", "words", "--steps", "1", "--set", "distill.documents=8"],
}


def run(name: str, model: Path, folder: Path, before: Callable[[], None] | None = None) -> Outcome:
    folder.mkdir(exist_ok=True)
    return dsc(folder, *(str(model) if word == "MODEL" else word for word in COMMANDS[name]), before=before)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "gguf" else pytest.mark.verify) for name in COMMANDS]
)
def test_files_that_may_not_grow(name: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    """As on a full disk: a write ends in the middle of a large file."""
    warm()

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))

    found = run(name, tiny_qwen2, tmp_path / "out", limit)
    assert found.code == 1
    assert faults(found) == []
    assert not loads(tmp_path / "out" / "out")
    assert run(name, tiny_qwen2, tmp_path / "out").code == 0


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.verify) for name in COMMANDS])
def test_few_file_handles(name: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    warm()

    def limit() -> None:
        os.closerange(3, 512)
        resource.setrlimit(resource.RLIMIT_NOFILE, (32, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    assert faults(run(name, tiny_qwen2, tmp_path / "out", limit)) == []


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


@pytest.mark.verify
def test_no_shared_memory(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Workers make their locks there."""
    command = [
        "unshare",
        "-rm",
        "sh",
        "-c",
        'mount -t tmpfs -o size=4k tmpfs /dev/shm && cat /dev/zero > /dev/shm/x; "$@"',
    ]
    if shutil.which("unshare") is None or subprocess.run([*command, "sh", "true"], check=False).returncode:
        pytest.skip("no mount namespaces here")
    words = (str(tiny_qwen2) if word == "MODEL" else word for word in COMMANDS["text"])
    done = subprocess.run(
        [*command, "sh", sys.executable, "-m", "deepseek_compress", *words, "--workers", "2"],
        capture_output=True, text=True, check=False, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or "error: " in done.stderr, done.stderr


@pytest.mark.verify
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 0.75, 0.95])
def test_ctrl_c_with_workers_is_one_line(share: float, tiny_v3: Path, tmp_path: Path) -> None:
    """The terminal sends it to all processes of the group, whatever they are doing."""
    words = [str(tiny_v3) if word == "MODEL" else word for word in COMMANDS["text"]]
    command = [sys.executable, "-m", "deepseek_compress", *words, "--workers", "2"]

    def start(folder: Path) -> subprocess.Popen[str]:
        folder.mkdir()
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, "PYTHONPATH": str(ROOT)}, start_new_session=True, text=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
        while not (folder / "out" / ".dsc_run" / "state.json").exists() and process.poll() is None:
            time.sleep(0.01)
        return process

    whole, began = start(tmp_path / "whole"), time.monotonic()
    _, said = whole.communicate()
    assert whole.returncode == 0, said
    seconds = time.monotonic() - began
    process = start(tmp_path / "stopped")
    time.sleep(share * seconds)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode in (130, 0), said
    assert "Traceback" not in said
    assert "Error" not in said
    if process.returncode:
        assert said.count("stopped; ") == 1, said

"""`kill -9` at random moments of a calibrated run, the same command again: the bytes of an uninterrupted run.

Real processes of the real command line. The clock starts when the run claims its output, so that no kill falls into
imports. Either the whole process group dies at once, or only the first process: what it started must end by itself,
while the same command already runs again.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError

OPTIONS = ["-r", "w4a16", "--group-size", "32", "--samples", "16", "--length", "64"]
CLAIMED = ".dsc_blocks/identity.json"

Kill = Callable[[int], None]


def start(model: Path, out: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "deepseek_compress", "quantize", str(model), "-o", str(out), *OPTIONS, *more]
    return subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def until_claimed(process: subprocess.Popen[bytes], out: Path) -> None:
    while not (out / CLAIMED).exists() and process.poll() is None:
        time.sleep(0.01)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors.decode()


def contents(out: Path) -> dict[str, bytes]:
    """Everything the promise of same bytes covers."""
    files = [file for file in sorted(out.rglob("*")) if file.is_file() and file.name != "dsc_run.json"]
    return {str(file.relative_to(out)): file.read_bytes() for file in files}


def loads(out: Path) -> bool:
    try:
        open_checkpoint(out)
    except DscError:
        return False
    return True


def group_of(pid: int) -> list[str]:
    """Command lines of the living processes of a process group."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state, _, group = (place / "stat").read_text().rsplit(")", 1)[1].split()[:3]
            if int(group) == pid and state != "Z":
                found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def the_group(pid: int) -> None:
    os.killpg(pid, signal.SIGKILL)


def only_the_first(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def uninterrupted(model: Path, out: Path, *more: str) -> tuple[dict[str, bytes], float]:
    """What the output must be, and the seconds from the claim to the end."""
    process = start(model, out, *more)
    until_claimed(process, out)
    began = time.monotonic()
    finish(process)
    return contents(out), time.monotonic() - began


def killed(model: Path, out: Path, kill: Kill, wait: float, expected: dict[str, bytes], *more: str) -> bool:
    """Kill a run `wait` seconds after its claim and finish it; whether the kill met a living process."""
    process = start(model, out, *more)
    until_claimed(process, out)
    time.sleep(wait)
    met = process.poll() is None
    if met:
        kill(process.pid)
    process.communicate()
    assert not loads(out) or {**expected, **contents(out)} == expected  # nothing that loads, or all of it
    finish(start(model, out, *more))
    assert contents(out) == expected
    deadline = time.monotonic() + 20
    while (left := group_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left
    return met


def kill_repeatedly(model: Path, tmp: Path, kills: list[Kill], seed: int, *more: str) -> None:
    """One output for each kill, at seeded shares of the time that the work takes."""
    expected, seconds = uninterrupted(model, tmp / "whole", *more)
    shares = random.Random(seed)
    for number, kill in enumerate(kills):
        for attempt in range(5):  # where the run was faster than expected and had ended, nothing was killed
            wait = shares.uniform(0, 0.95 - 0.15 * attempt) * seconds
            if killed(model, tmp / f"killed-{number}-{attempt}", kill, wait, expected, *more):
                break
        else:
            pytest.fail("no kill met a living process")


@pytest.mark.slow
def test_three_kills(tiny_v3: Path, tmp_path: Path) -> None:
    kill_repeatedly(tiny_v3, tmp_path, [the_group, only_the_first, the_group], seed=0)


@pytest.mark.verify
@pytest.mark.parametrize("kill", [the_group, only_the_first])
@pytest.mark.parametrize("model", ["tiny_v3", "tiny_qwen2"])
def test_twenty_kills(model: str, kill: Kill, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    kill_repeatedly(request.getfixturevalue(model), tmp_path, [kill] * 5, len(model))

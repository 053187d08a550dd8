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
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import contents, finish, group_of, loads, start, until_claimed

Kill = Callable[[int], None]
TWO = ("--workers", "2")


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


def checkpoint(files: dict[str, bytes]) -> dict[str, bytes]:
    """What is loaded; the pipeline's note that the stage is finished, in the manifest, may still be missing."""
    house = ("dsc_manifest.json", ".dsc_names", ".dsc_run/", ".dsc_blocks/", ".dsc_partial/")
    return {name: content for name, content in files.items() if not name.startswith(house)}


def killed(model: Path, out: Path, kill: Kill, wait: float, expected: dict[str, bytes], *more: str) -> float | None:
    """Kill a run `wait` seconds after its claim and finish it; the run's own seconds where it ended before."""
    process = start(model, out, *more)
    until_claimed(process, out)
    began = time.monotonic()
    try:
        process.wait(wait)
        ended: float | None = time.monotonic() - began
    except subprocess.TimeoutExpired:
        ended = None
        kill(process.pid)
    process.communicate()
    assert not loads(out) or checkpoint(contents(out)) == checkpoint(expected)  # nothing that loads, or all of it
    finish(start(model, out, *more))
    assert contents(out) == expected
    deadline = time.monotonic() + 20
    while (left := group_of(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not left, left
    return ended


def kill_repeatedly(model: Path, tmp: Path, kills: list[Kill], seed: int, *more: str) -> None:
    """One output for each kill, at seeded shares of the time that the work takes."""
    expected, seconds = uninterrupted(model, tmp / "whole", *more)
    shares = random.Random(seed)
    for number, kill in enumerate(kills):
        for attempt in range(5):  # a run that had ended was faster than the one before: nothing was killed
            wait = shares.uniform(0, 0.95) * seconds
            ended = killed(model, tmp / f"killed-{number}-{attempt}", kill, wait, expected, *more)
            if ended is None:
                break
            seconds = ended
        else:
            pytest.fail("no kill met a living process")


@pytest.mark.slow
@pytest.mark.parametrize(("kill", "more"), [(the_group, ()), (the_group, TWO), (only_the_first, TWO)])
def test_killed_once(tiny_v3: Path, tmp_path: Path, kill: Kill, more: tuple[str, ...]) -> None:
    """Three kills; the two with workers are told apart by who is left to notice."""
    kill_repeatedly(tiny_v3, tmp_path, [kill], len(more), *more)


@pytest.mark.verify
@pytest.mark.parametrize(("kill", "more"), [(the_group, ()), (the_group, TWO), (only_the_first, TWO)])
@pytest.mark.parametrize("model", ["tiny_v3", "tiny_qwen2"])
def test_killed_often(
    model: str, kill: Kill, more: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Twenty-four kills in all."""
    kill_repeatedly(request.getfixturevalue(model), tmp_path, [kill] * 4, 10 * len(model) + len(more), *more)

"""`kill -9` at random moments of a calibrated run, the same command again: the bytes of an uninterrupted run.

Real processes of the real command line. The clock starts when the run claims its output, so that no kill falls into
imports. Either the whole process group dies at once, or only the first process: what it started must end by itself,
while the same command already runs again.
"""

from __future__ import annotations

import os
import random
import signal
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

"""Killed after any call that creates, renames, syncs or removes, or such a call fails: the same command goes on, to the
same bytes.

And with a state file damaged in between: the bytes of an uninterrupted run all the same.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from failing import KILLED, Fault
from windows import COMMANDS, contents, failed, killed, run, uninterrupted

EVERY = {"run": 8, "tensorrt-rtx": 3}  # kills after one of so many calls, where a run takes more than a second
FAILING = 4  # one of so many calls fails, in its turn


def spread(count: int, step: int, seed: str) -> list[int]:
    """Of the calls 1 to count - 1 one of each `step`, chosen by a seed; the first two always."""
    rng = random.Random(seed)
    chosen = {rng.randrange(first, min(first + step, count)) for first in range(1, count, step)}
    return sorted(chosen | {1, 2})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data-free", "text"])
def test_killed_after_some_calls(name: str, given: Path, tmp_path: Path) -> None:
    """The first two are the making of `.dsc_run`, which once was a trap."""
    expected, count = uninterrupted(name, given, tmp_path)
    for after in (1, 2, *sorted(random.Random(len(name)).sample(range(3, count), 3))):
        killed(name, given, tmp_path / str(after), after, expected)


@pytest.mark.verify
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_after_each_call(name: str, given: Path, tmp_path: Path) -> None:
    expected, count = uninterrupted(name, given, tmp_path, apart=True)
    assert count > (3 if name == "compare" else 20)
    for after in spread(count, EVERY.get(name, 1), name):
        killed(name, given, tmp_path / str(after), after, expected, apart=True)


@pytest.mark.verify
@pytest.mark.parametrize("name", COMMANDS)
def test_calls_that_fail(name: str, given: Path, tmp_path: Path) -> None:
    """As on a full disk: one line, and the same command goes on."""
    expected, count = uninterrupted(name, given, tmp_path, apart=True)
    for after in spread(count, FAILING * EVERY.get(name, 1), f"{name} fails"):
        failed(name, given, tmp_path / str(after), after, expected, apart=True)


def state_files(folder: Path) -> list[Path]:
    """What an interrupted run would take up."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and ".dsc_" in str(file.relative_to(folder))]


def damage(file: Path, rng: random.Random) -> None:
    """A bit of it is flipped, it is cut, or it is emptied."""
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(rng.choice([bytes(content), bytes(content[: len(content) // 2]), b""]))


@pytest.mark.verify
@pytest.mark.parametrize("name", ["data-free", "text", "calibrate", "distill", "recording", "allocate", "run"])
def test_killed_and_a_state_file_damaged(name: str, given: Path, tmp_path: Path) -> None:
    """Forty-two kills in all, thirty of them at least with a file that could be damaged."""
    expected, count = uninterrupted(name, given, tmp_path, apart=True)
    rng, damaged = random.Random(len(name)), 0
    for number in range(6):
        folder, after = tmp_path / f"damaged-{number}", rng.randrange(5, count)
        assert run(name, given, folder, Fault(after), apart=True).code == KILLED
        files = [file for file in state_files(folder) if file.stat().st_size]
        if files:
            damage(file := rng.choice(files), rng)
            damaged += 1
        again = run(name, given, folder, apart=True)
        assert again.code == 0, (after, file, again.err)
        left = contents(folder)
        assert left.keys() == expected.keys(), (after, file)
        assert [name for name in left if left[name] != expected[name]] == [], (after, file)
    assert damaged >= 5

"""Killed after any call that creates, renames, syncs or removes: the same command goes on, to the same bytes.

And with a state file damaged in between: the bytes of an uninterrupted run all the same.
"""

from __future__ import annotations

import builtins
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Outcome, dsc, warm

TEXT = ["--samples", "4", "--length", "32"]
COMMANDS = {
    "data-free": ["quantize", "MODEL", "-o", "out", "-r", "w4a16-fast", "--group-size", "32"],
    "text": ["quantize", "MODEL", "-o", "out", "-r", "w4a16", "--group-size", "32", *TEXT],
    "calibrate": ["calibrate", "MODEL", "-o", "out", *TEXT],
    "evaluate": ["evaluate", "MODEL", "-o", "out.json", "--problems", "2", "--set", "efficiency=false"],
    "export": ["export", "MODEL", "-o", "out", "--target", "bf16"],
    "onnx": ["export", "MODEL", "-o", "out", "--target", "onnx", "--set", "verify=false"],
}
CALLS = ("replace", "rename", "mkdir", "fsync", "unlink", "rmdir", "ftruncate")


def dying(after: int, told: Path | None = None) -> Callable[[], None]:
    """End the process after so many of the calls; 0: never, but write down how many there were."""
    count = 0

    def counted(call: Callable[..., Any], writes: Callable[..., bool] = lambda *a, **k: True) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            result = call(*arguments, **named)
            if writes(*arguments, **named):
                count += 1
                if told is not None:
                    with original(told, "w") as file:
                        file.write(str(count))
                if count == after:
                    os._exit(137)
            return result

        return wrapped

    original = builtins.open

    def opens_to_write(file: Any, mode: str = "r", *more: Any, **named: Any) -> bool:
        return not isinstance(file, int) and any(letter in mode for letter in "wax")

    def install() -> None:
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        os.open = counted(os.open, lambda path, flags, *more, **named: bool(flags & os.O_CREAT))
        builtins.open = counted(original, opens_to_write)

    return install


def contents(folder: Path) -> dict[str, bytes]:
    """Everything the promise of same bytes covers, and nothing temporary."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    without = ("stdout", "stderr", "dsc_run.json", "pages.json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name not in without}


def run(name: str, model: Path, folder: Path, before: Callable[[], None] | None = None) -> Outcome:
    folder.mkdir(exist_ok=True)
    return dsc(folder, *(str(model) if word == "MODEL" else word for word in COMMANDS[name]), before=before)


def uninterrupted(name: str, model: Path, tmp: Path) -> tuple[dict[str, bytes], int]:
    warm()
    found = run(name, model, tmp / "whole", dying(0, tmp / "count"))
    assert found.code == 0, found.err
    return contents(tmp / "whole"), int((tmp / "count").read_text())


def killed(name: str, model: Path, folder: Path, after: int, expected: dict[str, bytes]) -> None:
    found = run(name, model, folder, dying(after))
    assert found.code == 137, (after, found.err)
    again = run(name, model, folder)
    assert again.code == 0, (after, again.err)
    left = contents(folder)
    assert left.keys() == expected.keys(), after
    assert [file for file in left if left[file] != expected[file]] == [], after


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data-free", "text"])
def test_killed_after_some_calls(name: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    """The first two are the making of `.dsc_run`, which once was a trap."""
    expected, count = uninterrupted(name, tiny_qwen2, tmp_path)
    for after in (1, 2, *sorted(random.Random(len(name)).sample(range(3, count), 3))):
        killed(name, tiny_qwen2, tmp_path / str(after), after, expected)


@pytest.mark.verify
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_after_each_call(name: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    expected, count = uninterrupted(name, tiny_qwen2, tmp_path)
    assert count > 20
    for after in range(1, count):
        killed(name, tiny_qwen2, tmp_path / str(after), after, expected)


def state_files(folder: Path) -> list[Path]:
    """What an interrupted run would take up."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and ".dsc_" in str(file.relative_to(folder))]


@pytest.mark.verify
@pytest.mark.parametrize("name", ["data-free", "text", "calibrate"])
def test_killed_and_a_state_file_damaged(name: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Thirty kills in all; what was damaged is flipped, cut, emptied or gone."""
    expected, count = uninterrupted(name, tiny_qwen2, tmp_path)
    rng = random.Random(len(name))
    for number in range(10):
        folder, after = tmp_path / f"damaged-{number}", rng.randrange(5, count)
        assert run(name, tiny_qwen2, folder, dying(after)).code == 137
        files = [file for file in state_files(folder) if file.stat().st_size]
        if files:
            file = rng.choice(files)
            content = bytearray(file.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            file.write_bytes(rng.choice([bytes(content), bytes(content[: len(content) // 2]), b""]))
        again = run(name, tiny_qwen2, folder)
        assert again.code == 0, (after, file, again.err)
        left = contents(folder)
        assert left.keys() == expected.keys(), (after, file)
        assert [name for name in left if left[name] != expected[name]] == [], (after, file)

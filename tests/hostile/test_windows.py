"""Killed after any call that creates, renames, syncs or removes: the same command goes on, to the same bytes.

So it does after a disk that was full at that call. And with a state file damaged in between: the bytes of an
uninterrupted run all the same.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from harness import Outcome, dsc, faults, warm

TEXT = ["--samples", "4", "--length", "32"]
COMMANDS = {
    "data-free": ["quantize", "MODEL", "-o", "out", "-r", "w4a16-fast", "--group-size", "32"],
    "text": ["quantize", "MODEL", "-o", "out", "-r", "w4a16", "--group-size", "32", *TEXT],
    "calibrate": ["calibrate", "MODEL", "-o", "out", *TEXT],
    "evaluate": ["evaluate", "MODEL", "-o", "out.json", "--problems", "2", "--set", "efficiency=false"],
    "export": ["export", "MODEL", "-o", "out", "--target", "bf16"],
    "onnx": ["export", "MODEL", "-o", "out", "--target", "onnx", "--set", "verify=false"],
    "gguf": ["export", "MODEL", "-o", "out", "--target", "gguf"],
    "prune": ["prune", "MODEL", "-o", "out", *TEXT],
    "run": ["run", "r.yaml", "--model", "MODEL", "-o", "out"],
    "distill": ["distill", "MODEL", "-o", "out", "--cache", "words", "--steps", "1", "--set", "distill.documents=8"],
    "allocate": ["allocate", "MODEL", "-o", "out", "--target", "8 bits per weight", "--group-size", "32", *TEXT],
}
RECIPE = """
stages:
  - {compress: {weights: {rtn: {group_size: 32}}}, as: packed}
  - {export: {target: bf16}, from: packed, as: plain}
  - {evaluate: {problems: 2, efficiency: false}, from: plain, as: report}
"""
LONG = ("distill", "allocate", "onnx")  # of them every fourth call
CALLS = ("replace", "rename", "mkdir", "fsync", "unlink", "rmdir", "ftruncate", "symlink", "link", "truncate")


def dying(after: int, told: Path | None = None, full: bool = False) -> Callable[[], None]:
    """End the process after so many of the calls; 0: never, but write down how many there were.

    full: it is told that there is no space, in that call and in all that create or sync after it.
    """
    count = 0

    def counted(call: Callable[..., Any], writes: Callable[..., bool] = lambda *a, **k: True) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **named: Any) -> Any:
            nonlocal count
            counts = writes(*arguments, **named)
            if full and counts and count + 1 >= after and call not in removing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(arguments[0]))
            result = call(*arguments, **named)
            if counts:
                count += 1
                if told is not None:
                    with original(told, "w") as file:
                        file.write(str(count))
                if count == after and not full:
                    os._exit(137)
            return result

        return wrapped

    original, removing = builtins.open, (os.unlink, os.rmdir)

    def opens_to_write(file: Any, mode: str = "r", *more: Any, **named: Any) -> bool:
        return not isinstance(file, int) and any(letter in mode for letter in "wax")

    def install() -> None:
        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        os.open = counted(os.open, lambda path, flags, *more, **named: bool(flags & os.O_CREAT))
        builtins.open = io.open = counted(original, opens_to_write)  # type: ignore[misc]

    return install


def contents(folder: Path) -> dict[str, bytes]:
    """Everything the promise of same bytes covers, and nothing temporary."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    without = ("stdout", "stderr", "dsc_run.json", "pages.json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name not in without}


def run(name: str, model: Path, folder: Path, before: Callable[[], None] | None = None) -> Outcome:
    folder.mkdir(exist_ok=True)
    (folder / "r.yaml").write_text(RECIPE)
    return dsc(folder, *(str(model) if word == "MODEL" else word for word in COMMANDS[name]), before=before)


def uninterrupted(name: str, model: Path, tmp: Path) -> tuple[dict[str, bytes], int]:
    warm()
    found = run(name, model, tmp / "whole", dying(0, tmp / "count"))
    assert found.code == 0, found.err
    return contents(tmp / "whole"), int((tmp / "count").read_text())


def killed(name: str, model: Path, folder: Path, after: int, expected: dict[str, bytes], full: bool = False) -> None:
    found = run(name, model, folder, dying(after, full=full))
    if full:
        assert faults(found) == [], after
    assert found.code == (1 if full else 137), (after, found.err)
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
    for after in range(1, count, 4 if name in LONG else 1):
        killed(name, tiny_qwen2, tmp_path / str(after), after, expected)
        shutil.rmtree(tmp_path / str(after))


@pytest.mark.verify
@pytest.mark.parametrize("name", ["data-free", "text", "export", "evaluate"])
def test_a_disk_that_is_full_at_each_call(name: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Until that moment; what is removed is removed."""
    expected, count = uninterrupted(name, tiny_qwen2, tmp_path)
    for after in range(1, count, 2):
        killed(name, tiny_qwen2, tmp_path / str(after), after, expected, full=True)
        shutil.rmtree(tmp_path / str(after))


def state_files(folder: Path) -> list[Path]:
    """What an interrupted run would take up."""
    return [file for file in sorted(folder.rglob("*")) if file.is_file() and ".dsc_" in str(file.relative_to(folder))]


def damage(folder: Path, rng: random.Random) -> Path | None:
    """Flip a bit of one of them, cut it, empty it, or remove it; None where there is none."""
    files = [file for file in state_files(folder) if file.stat().st_size]
    if not files:
        return None
    file = rng.choice(files)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    how = rng.choice([bytes(content), bytes(content[: len(content) // 2]), b"", None])
    file.unlink() if how is None else file.write_bytes(how)
    return file


@pytest.mark.verify
@pytest.mark.parametrize("name", ["data-free", "text", "calibrate"])
def test_killed_and_a_state_file_damaged(name: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Thirty kills in all; what was damaged is flipped, cut, emptied or gone."""
    expected, count = uninterrupted(name, tiny_qwen2, tmp_path)
    rng = random.Random(len(name))
    for number in range(10):
        folder, after = tmp_path / f"damaged-{number}", rng.randrange(5, count)
        assert run(name, tiny_qwen2, folder, dying(after)).code == 137
        file = damage(folder, rng)
        again = run(name, tiny_qwen2, folder)
        assert again.code == 0, (after, file, again.err)
        left = contents(folder)
        assert left.keys() == expected.keys(), (after, file)
        assert [name for name in left if left[name] != expected[name]] == [], (after, file)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", pytest.param("data-free", marks=pytest.mark.verify)])
def test_each_file_of_an_interrupted_run_damaged(name: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    """Spool, ledger, shard, facts of a block, identity, state: each is made again, or not needed any more."""
    expected, count = uninterrupted(name, tiny_qwen2, tmp_path)
    stopped = tmp_path / "stopped"
    assert run(name, tiny_qwen2, stopped, dying(3 * count // 4)).code == 137
    left = [str(file.relative_to(stopped)) for file in state_files(stopped) if file.stat().st_size]
    assert name != "text" or {"f32", "json", "safetensors"} <= {Path(file).suffix.strip(".") for file in left}, left
    for number, file in enumerate(left):
        folder = tmp_path / str(number)
        shutil.copytree(stopped, folder)
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)
        again = run(name, tiny_qwen2, folder)
        assert again.code == 0, (file, again.err)
        assert contents(folder) == expected, file

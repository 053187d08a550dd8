"""Killed after any call that creates, renames, syncs or removes, or such a call fails: the same command goes on, to the
same bytes.

And with a state file damaged in between: the bytes of an uninterrupted run all the same.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from failing import KILLED, Fault
from harness import Outcome, dsc, faults, warm
from test_pages import record

TEXT = ["--samples", "4", "--length", "32"]
COMMANDS = {
    "data-free": ["quantize", "MODEL", "-o", "out", "-r", "w4a16-fast", "--group-size", "32"],
    "text": ["quantize", "MODEL", "-o", "out", "-r", "w4a16", "--group-size", "32", *TEXT],
    "calibrate": ["calibrate", "MODEL", "-o", "out", *TEXT],
    "evaluate": ["evaluate", "MODEL", "-o", "out.json", "--problems", "2", "--set", "efficiency=false"],
    "export": ["export", "MODEL", "-o", "out", "--target", "bf16"],
    "onnx": ["export", "MODEL", "-o", "out", "--target", "onnx", "--set", "verify=false"],
    "gguf": ["export", "MODEL", "-o", "out", "--target", "gguf"],
    "compare": ["compare", "given/report.json", "-o", "out.html"],
}


def contents(folder: Path) -> dict[str, bytes]:
    """Everything the promise of same bytes covers, and nothing temporary."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    without = ("stdout", "stderr", "dsc_run.json", "pages.json")
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.name not in without}


def run(name: str, model: Path, folder: Path, fault: Fault | None = None) -> Outcome:
    folder.mkdir(exist_ok=True)
    (folder / "given").mkdir(exist_ok=True)  # whose name stands in the page
    (folder / "given" / "report.json").write_text(json.dumps(record()))
    return dsc(folder, *(str(model) if word == "MODEL" else word for word in COMMANDS[name]), fault=fault)


def uninterrupted(name: str, model: Path, tmp: Path) -> tuple[dict[str, bytes], int]:
    warm()
    found = run(name, model, tmp / "whole", Fault(0, tmp / "count"))
    assert found.code == 0, found.err
    return contents(tmp / "whole"), int((tmp / "count").read_text())


def killed(name: str, model: Path, folder: Path, after: int, expected: dict[str, bytes]) -> None:
    found = run(name, model, folder, Fault(after))
    assert found.code == KILLED, (after, found.err)
    goes_on(name, model, folder, after, expected)


def failed(name: str, model: Path, folder: Path, after: int, expected: dict[str, bytes]) -> None:
    found = run(name, model, folder, Fault(after, dies=False))
    assert faults(found) == [], after
    goes_on(name, model, folder, after, expected)


def goes_on(name: str, model: Path, folder: Path, after: int, expected: dict[str, bytes]) -> None:
    """The same command, to the bytes of an uninterrupted one."""
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
    assert count > (3 if name == "compare" else 20)
    for after in range(1, count):
        killed(name, tiny_qwen2, tmp_path / str(after), after, expected)


@pytest.mark.verify
def test_a_call_that_fails(tiny_qwen2: Path, tmp_path: Path) -> None:
    """As on a full disk: one line, and the same command goes on."""
    expected, count = uninterrupted("gguf", tiny_qwen2, tmp_path)
    for after in random.Random(1).sample(range(1, count), 3):
        failed("gguf", tiny_qwen2, tmp_path / str(after), after, expected)


@pytest.mark.verify
@pytest.mark.parametrize("name", COMMANDS)
def test_each_call_that_fails(name: str, tiny_qwen2: Path, tmp_path: Path) -> None:
    expected, count = uninterrupted(name, tiny_qwen2, tmp_path)
    for after in range(1, count):
        failed(name, tiny_qwen2, tmp_path / str(after), after, expected)


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
        assert run(name, tiny_qwen2, folder, Fault(after)).code == KILLED
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

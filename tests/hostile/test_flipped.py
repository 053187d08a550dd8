"""One flipped bit in a shard or in the index of a recording, then every command that reads it: it is named, exit 1."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import dsc, faults, warm

SHARD, INDEX = "model-00001-of-00001.safetensors", "teacher.json"
MADE = {  # in this order
    "plain": ["export", "SOURCE", "-o", "plain", "--target", "bf16"],
    "packed": ["quantize", "SOURCE", "-o", "packed", "-r", "w4a16-fast", "--group-size", "32"],
    "words": ["distill", "plain", "-o", "student", "--cache", "words", "--steps", "1", "--set", "distill.documents=8"],
}
EVALUATE = ["--problems", "2", "--set", "efficiency=false"]
READS = {  # what reads each of them, beside the command that made it
    "packed": [
        ["inspect", "packed"],
        ["evaluate", "packed", "-o", "x.json", *EVALUATE],
        ["evaluate", "plain", "--reference", "packed", "-o", "x.json", *EVALUATE],
        ["export", "packed", "-o", "x", "--target", "bf16"],
        ["export", "packed", "-o", "x", "--target", "compressed-tensors"],
        ["export", "packed", "-o", "x", "--target", "onnx"],
        ["export", "packed", "-o", "x", "--target", "gguf"],
        ["generate", "packed", "--prompt", "1 + 1", "--max-tokens", "2"],
        ["chat", "packed"],
    ],
    "words": [["distill", "plain", "-o", "x", "--cache", "words", "--steps", "1"]],
}
Outputs = Callable[[str], Path]


def flip(file: Path) -> None:
    """A bit of it, where a seed says."""
    content = bytearray(file.read_bytes())
    rng = random.Random(f"{file.name} {len(content)}")
    content[rng.randrange(len(content))] ^= 2
    file.write_bytes(content)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, tiny_qwen2: Path) -> Outputs:
    """Makes an output, and those that it is made of, where they are asked for first; the folder with all of them."""
    warm()
    home = tmp_path_factory.mktemp("outputs")

    def make(name: str) -> Path:
        for word in MADE[name][1:]:
            if word in MADE and word != name:
                make(word)
        if not (home / name).exists():
            found = dsc(home, *(str(tiny_qwen2) if word == "SOURCE" else word for word in MADE[name]))
            assert found.code == 0, found.err
        return home

    return make


@pytest.mark.slow
@pytest.mark.parametrize(("output", "file"), [("packed", SHARD), ("words", INDEX)])
def test_every_command_names_it(output: str, file: str, outputs: Outputs, tmp_path: Path, tiny_qwen2: Path) -> None:
    for name in {output, *(word for words in READS[output] for word in words if word in MADE)}:
        home = outputs(name)
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    flip(tmp_path / "home" / output / file)
    again = [str(tiny_qwen2) if word == "SOURCE" else word for word in MADE[output]]
    for words in [*READS[output], *([again] if file == SHARD else [])]:
        found = dsc(tmp_path / "home", *words)
        assert faults(found) == [], words
        assert found.code == 1, (words, found.out)
        assert any(file in line for line in found.errors), (words, found.errors)
        assert not (tmp_path / "home" / "x" / "config.json").exists(), words

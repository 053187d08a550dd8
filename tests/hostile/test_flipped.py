"""One flipped bit in each kind of file of an output, then every command that reads it: it is named, exit 1.

What an interrupted run left (spools, ledgers, state) is made again instead: `test_windows`.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import dsc, faults, loads, warm

SHARD, INDEX, MANIFEST = "model-00001-of-00001.safetensors", "teacher.json", "dsc_manifest.json"
TEXT = ["--samples", "4", "--length", "32"]
GROUPS = ["-r", "w4a16", "--group-size", "32"]
MADE = {  # in this order
    "plain": ["export", "SOURCE", "-o", "plain", "--target", "bf16"],
    "packed": ["quantize", "SOURCE", "-o", "packed", "-r", "w4a16-fast", "--group-size", "32"],
    "words": ["distill", "plain", "-o", "student", "--cache", "words", "--steps", "1", "--set", "distill.documents=8"],
    "statistics": ["calibrate", "plain", "-o", "statistics", *TEXT],
    "onnx": ["export", "packed", "-o", "onnx", "--target", "onnx", "--set", "verify=false"],
    "gguf": ["export", "packed", "-o", "gguf", "--target", "gguf"],
    "engine": ["export", "packed", "-o", "engine", "--target", "tensorrt-rtx", "--set", "verify=false"],
}
EVALUATE = ["--problems", "2", "--set", "efficiency=false"]
PROMPT = ["--prompt", "1 + 1", "--max-tokens", "2"]
DEPLOYED = {
    name: [
        ["generate", name, *PROMPT],
        ["chat", name],
        ["evaluate", name, "--reference", "packed", "-o", "x.json", *EVALUATE],
    ]
    for name in ("onnx", "gguf", "engine")
}
READS = {  # what reads each of them, beside the command that made it
    "packed": [
        ["inspect", "packed"],
        ["evaluate", "packed", "-o", "x.json", *EVALUATE],
        ["evaluate", "plain", "--reference", "packed", "-o", "x.json", *EVALUATE],
        ["export", "packed", "-o", "x", "--target", "bf16"],
        ["export", "packed", "-o", "x", "--target", "compressed-tensors"],
        ["export", "packed", "-o", "x", "--target", "onnx"],
        ["export", "packed", "-o", "x", "--target", "gguf"],
        ["generate", "packed", *PROMPT],
        ["chat", "packed"],
        ["calibrate", "packed", "-o", "x", *TEXT],
        ["evaluate", "onnx", "--reference", "packed", "-o", "x.json", *EVALUATE],
    ],
    "words": [["distill", "plain", "-o", "x", "--cache", "words", "--steps", "1"]],
    "statistics": [["quantize", "plain", "-o", "x", *GROUPS, "--statistics", "statistics"]],
    **DEPLOYED,
}
SLICE = (("packed", SHARD), ("words", INDEX))  # in the default tests
FILES = (
    *SLICE,
    *(("packed", name) for name in ("config.json", "tokenizer.json", "model.safetensors.index.json", MANIFEST)),
    ("words", "teacher-00001.safetensors"),
    *(("statistics", name) for name in ("statistics-00001.safetensors", "calibration.json", MANIFEST)),
    *(("onnx", name) for name in ("model.onnx", "model.onnx.data", "config.json", "tokenizer.json", MANIFEST)),
    *(("gguf", name) for name in ("model.gguf", MANIFEST)),
    *(("engine", name) for name in ("model.engine", "model.onnx", MANIFEST)),
)
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
@pytest.mark.parametrize(
    ("output", "file"), [pytest.param(*case, marks=() if case in SLICE else pytest.mark.verify) for case in FILES]
)
def test_every_command_names_it(output: str, file: str, outputs: Outputs, tmp_path: Path, tiny_qwen2: Path) -> None:
    if output == "engine":
        pytest.importorskip("tensorrt_rtx")
    for name in {output, *(word for words in READS[output] for word in words if word in MADE)}:
        home = outputs(name)
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    flip(tmp_path / "home" / output / file)
    again = [str(tiny_qwen2) if word == "SOURCE" else word for word in MADE[output]]
    for words in [*READS[output], *([again] if output != "words" and file != MANIFEST else [])]:
        found = dsc(tmp_path / "home", *words)
        assert faults(found) == [], words
        assert found.code == 1, (words, found.out)
        assert any(file in line for line in found.errors), (words, found.errors)
        assert not loads(tmp_path / "home" / "x"), words

"""One flipped bit in each kind of file of an output, then every command that reads it: the file is named, exit 1.

And in what an interrupted run left: it is made again. `dsc plan` and a first look of others read headers alone, so
that a damaged weight is seen by what reads weights.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from harness import dsc, faults, warm

GROUP = ["--group-size", "32"]
TEXT = ["--samples", "2", "--length", "16"]
SHARD, ENGINE = "model-00001-of-00001.safetensors", "model.engine"
STATISTICS, WORDS = "statistics-00001.safetensors", "teacher-00001.safetensors"
MADE = {  # in this order
    "plain": ["export", "SOURCE", "-o", "plain", "--target", "bf16"],
    "packed": ["quantize", "SOURCE", "-o", "packed", "-r", "w4a16-fast", *GROUP],
    "onnx": ["export", "packed", "-o", "onnx", "--target", "onnxruntime", "--set", "verify=false"],
    "gguf": ["export", "packed", "-o", "gguf", "--target", "gguf"],
    "engine": ["export", "plain", "-o", "engine", "--target", "tensorrt-rtx"],
    "statistics": ["calibrate", "plain", "-o", "statistics", *TEXT],
    "words": ["distill", "plain", "-o", "student", "--cache", "words", "--steps", "1", "--set", "distill.documents=8"],
    "report.dsc": ["evaluate", "plain", "-o", "report.json", "--problems", "2", "--set", "efficiency=false"],
    "mixed": ["allocate", "plain", "-o", "mixed", "--target", "8 bits per weight", *GROUP, *TEXT],
}  # fmt: skip
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
    "plain": [
        ["quantize", "plain", "-o", "x", "-r", "w4a16-fast", *GROUP],
        ["quantize", "plain", "-o", "x", *GROUP, *TEXT],
        ["prune", "plain", "-o", "x", *TEXT],
        ["calibrate", "plain", "-o", "x", *TEXT],
        ["distill", "plain", "-o", "x", "--steps", "1"],
        ["distill", "packed", "--student", "plain", "-o", "x", "--steps", "1"],
        ["allocate", "plain", "-o", "x", "--target", "8 bits per weight", *GROUP, *TEXT],
        ["run", "w4a16-fast", "--model", "plain", "-o", "x", *GROUP],
    ],
    "onnx": [
        ["generate", "onnx", "--prompt", "1 + 1", "--max-tokens", "2"],
        ["generate", "onnx/model.onnx", "--prompt", "1 + 1", "--max-tokens", "2"],
        ["chat", "onnx"],
    ],
    "gguf": [["generate", "gguf", "--prompt", "1 + 1"], ["chat", "gguf/model.gguf"]],
    "engine": [["generate", "engine", "--prompt", "1 + 1"], ["chat", "engine"]],
    "statistics": [["quantize", "plain", "-o", "x", "-r", "w4a16", *GROUP, "--statistics", "statistics"]],
    "words": [["distill", "plain", "-o", "x", "--cache", "words", "--steps", "1"]],
    "report.dsc": [],
    "mixed": [],
}
FILES = {
    "packed": [SHARD, "model.safetensors.index.json", "config.json", "tokenizer.json", "tokenizer_config.json",
               "generation_config.json", "LICENSE", "dsc_layers.json", "dsc_manifest.json"],
    "plain": [SHARD, "model.safetensors.index.json", "config.json", "tokenizer.json", "dsc_manifest.json"],
    "onnx": ["model.onnx", "model.onnx.data", "config.json", "tokenizer.json", "dsc_manifest.json"],
    "gguf": ["model.gguf", "dsc_manifest.json"],
    "engine": [ENGINE, "model.onnx", "dsc_manifest.json"],
    "statistics": [STATISTICS, "dsc_manifest.json"],
    "words": [WORDS, "teacher.json"],
    "report.dsc": ["report.json", "report.md", "report.html"],
    "mixed": ["mixed.yaml", "allocation.json"],
}  # fmt: skip
AGAIN = {"dsc_manifest.json", "teacher.json"}  # a damaged one says nothing of the rest: the same command makes it again
CASES = [(output, file) for output, files in FILES.items() for file in files]
FAST = {("packed", SHARD), ("words", "teacher.json")}
Outputs = Callable[[str], Path]


def flip(file: Path, syntax: bool = False) -> None:
    """A bit of it, where a seed says; `syntax`: of its first byte, so that JSON is none any more."""
    content = bytearray(file.read_bytes())
    rng = random.Random(f"{file.name} {len(content)}")
    place = 0 if syntax else rng.randrange(len(content))
    if file.name == "dsc_manifest.json" and not syntax:
        place = content.index(b'"checksum": "') + 20  # what is damaged is still JSON
    content[place] ^= 1 << (rng.randrange(8) if place != 0 and file.suffix != ".json" else 1)
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


@pytest.mark.parametrize(
    ("output", "file"),
    [pytest.param(*case, marks=[] if case in FAST else pytest.mark.verify) for case in CASES],
    ids=lambda word: word,
)
def test_every_command_names_it(output: str, file: str, outputs: Outputs, tmp_path: Path, tiny_qwen2: Path) -> None:
    if output == "engine" and find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed")
    for name in {output, *(word for words in READS[output] for word in words if word in MADE)}:
        home = outputs(name)
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    flip(tmp_path / "home" / output / file)
    for words in READS[output]:
        found = dsc(tmp_path / "home", *words)
        assert faults(found) == [], words
        assert found.code == 1, (words, found.out)
        assert any(file in line for line in found.errors), (words, found.errors)
        assert not (tmp_path / "home" / "x" / "config.json").exists(), words
    if file not in AGAIN and output != "words":
        found = dsc(tmp_path / "home", *(str(tiny_qwen2) if word == "SOURCE" else word for word in MADE[output]))
        assert found.code == 1, (MADE[output], found.out)
        assert any(file in line for line in found.errors), found.errors


@pytest.mark.verify
@pytest.mark.parametrize("syntax", [False, True])
@pytest.mark.parametrize("output", ["plain", "packed", "onnx", "gguf", "statistics", "mixed"])
def test_a_damaged_manifest_makes_the_same_command_start_over(
    output: str, syntax: bool, outputs: Outputs, tmp_path: Path, tiny_qwen2: Path
) -> None:
    home = outputs(output)
    shutil.copytree(home, tmp_path / "home", symlinks=True)
    there = tmp_path / "home" / output
    before = {
        file.name: file.read_bytes() for file in there.iterdir() if file.is_file() and file.name != "dsc_run.json"
    }
    flip(there / "dsc_manifest.json", syntax)
    found = dsc(tmp_path / "home", *(str(tiny_qwen2) if word == "SOURCE" else word for word in MADE[output]))
    assert "dsc_manifest.json" in found.err
    if syntax:  # nothing says which files are ours
        assert faults(found, r"dsc_manifest\.json: not valid JSON .*; remove .*, then run the same command again") == []
        assert found.code in (0, 1)
        return
    assert found.code == 0, found.err
    assert "the stage runs again" in found.err
    after = {file.name: file.read_bytes() for file in there.iterdir() if file.is_file() and file.name != "dsc_run.json"}
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == []

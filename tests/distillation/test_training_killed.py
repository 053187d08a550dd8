"""`kill -9` five times in a training, the same command again each time: the weights of an uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_compress.tasks import mixture

STEPS = 40
KILLS = 5
# The real command line, which saves its state after every step instead of every minute
PROGRAM = (
    "from deepseek_compress.distillation import resume; resume.EVERY, resume.LARGEST_SHARE = 0.0, 1e9; "
    "from deepseek_compress.cli import main; main()"
)


def start(model: Path, text: Path, out: Path) -> subprocess.Popen[bytes]:
    sizes = ["--set", "keep=1.0", "--set", "batch_tokens=256", "--set", "learning_rate=0.001", "--seed", "3"]
    command = ["distill", str(model), "-o", str(out), "--data", str(text), "--steps", str(STEPS), *sizes]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command], env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


def saved(out: Path) -> int:
    """When the state of the training was written last, 0 where it was not."""
    file = out / ".dsc_distill" / "training.pt"
    return file.stat().st_mtime_ns if file.exists() else 0


def finished(process: subprocess.Popen[bytes], out: Path) -> dict[str, bytes]:
    """The weights, once the command has ended well."""
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors.decode()
    return {file.name: file.read_bytes() for file in sorted(out.glob("*.safetensors"))}


@pytest.mark.verify
def test_five_kills_change_no_bit(tiny_llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    problems = mixture(3, 60, "calibration")
    text.write_text("".join(json.dumps({"prompt": p.prompt, "completion": p.solution}) + "\n" for p in problems))
    whole = finished(start(tiny_llama, text, tmp_path / "whole"), tmp_path / "whole")
    assert whole
    out, draw, kills = tmp_path / "out", random.Random(1), 0
    for _ in range(KILLS):
        process, before = start(tiny_llama, text, out), saved(out)
        while saved(out) == before and process.poll() is None:  # it has gone on by a step at least
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.15))  # in a step, or in a save
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        assert kills == 0 or process.returncode in (0, -signal.SIGKILL)
    assert kills == KILLS, "more steps: it ended before the last kill"
    assert finished(start(tiny_llama, text, out), out) == whole

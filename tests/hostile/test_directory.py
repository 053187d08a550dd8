"""Files with the names of libraries in the current directory, which may be a checkpoint: no command imports one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_pages import record

from deepseek_compress import processes

PLANTED = ("torch", "blake3", "numpy", "sitecustomize", "usercustomize", "signal", "selectors", "tokenizers")
LIBRARY = (
    *("subprocess", "multiprocessing", "threading", "pathlib", "typing", "json", "socket", "queue", "pickle", "struct"),
    *("concurrent", "shutil", "tempfile", "random", "logging", "dataclasses", "enum", "re"),
)
ROOT = Path(__file__).parents[2]
TEXT = ["--samples", "4", "--length", "32"]
ALLOCATE = ["--set", "target=6 bits per weight", "--set", "weights=rtn", "--set", "windows=1"]
RECIPE = """model: .
calibration: {sources: [builtin], samples: 2, length: 16}
stages:
  - name: traces
    traces: {count: 2, attempts: 1, limit: 8, verifier: python}
  - name: packed
    from: model
    compress: {weights: {rtn: {num_bits: 4, group_size: 32}}}
  - export: {target: bf16}
"""
MINE = """
def right(question, answer, text):
    return True
"""
COMMANDS = {
    "workers": ["quantize", ".", "-o", "w", "-r", "w4a16", "--group-size", "32", *TEXT, "--workers", "2"],
    "evaluate": ["evaluate", ".", "-o", "r.json", "--problems", "2"],
    "plan": ["plan", ".", "-r", "w4a16-fast", "--group-size", "32", "--measure"],
    "inspect": ["inspect", "."],
    "prune": ["prune", ".", "-o", "p", *TEXT],
    "calibrate": ["calibrate", ".", "-o", "c", *TEXT],
    "export": ["export", ".", "-o", "x", "--target", "onnx"],
    "gguf": ["export", ".", "-o", "g", "--target", "gguf"],
    "generate": ["generate", ".", "--prompt", "1 + 1", "--max-tokens", "2"],
    "chat": ["chat", ".", "--max-tokens", "2"],
    "distill": ["distill", ".", "-o", "d", "--steps", "1", "--length", "16", "--set", "documents=4"],
    "allocate": ["allocate", ".", "-o", "a", *TEXT, *ALLOCATE, "--workers", "2"],
    "run": ["run", "recipe.yaml", "-o", "all", "--verifier", "../mine.py:right"],
    "compare": ["compare", "report.json", "-o", "page.html"],
    "doctor": ["doctor"],
    "list": ["list"],
}


def planted(model: Path, out: Path, names: Sequence[str] = PLANTED) -> Path:
    """A copy of the checkpoint with modules that leave a mark when they are imported."""
    shutil.copytree(model, out)
    (out / "recipe.yaml").write_text(RECIPE)
    (out.parent / "mine.py").write_text(MINE)  # its own folder is on its path
    (out / "chat_template.jinja").write_text("{{ messages[0].content }}")
    (out / "report.json").write_text(json.dumps(record()))
    (out / "generation_config.json").write_text(json.dumps({"eos_token_id": list(range(2, 512, 2))}))  # answers end
    for name in names:
        (out / f"{name}.py").write_text(f"open({str(out / 'MARK')!r}, 'a').write('{name} ')\n")
    return out


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "workers" else pytest.mark.verify) for name in COMMANDS]
)
def test_no_command_imports_from_the_current_directory(name: str, tiny_v3: Path, tmp_path: Path) -> None:
    here = planted(tiny_v3, tmp_path / "here")
    (tmp_path / "dsc").write_text(
        "from deepseek_compress.cli import main\nif __name__ == '__main__':\n    main()\n"
    )  # as pip installs it
    done = subprocess.run(
        [sys.executable, str(tmp_path / "dsc"), *COMMANDS[name]],
        cwd=here, capture_output=True, text=True, check=False, input="1 + 1\n",
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (here / "MARK").exists(), (here / "MARK").read_text()


def test_python_m_leaves_the_current_directory(tiny_qwen2: Path, tmp_path: Path) -> None:
    here = planted(tiny_qwen2, tmp_path / "here", [*PLANTED, *LIBRARY])
    done = subprocess.run(
        [sys.executable, "-m", "deepseek_compress", "inspect", "."],
        cwd=here, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (here / "MARK").exists(), (here / "MARK").read_text()


def test_the_environment_of_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    given = [str(tmp_path), "", ".", "relative", str(tmp_path / "other")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(given))
    (tmp_path / "json.py").write_text("raise SystemExit(3)")
    done = processes.run_python("-c", "import json, sys; print(json.dumps(sys.path))")
    assert done.returncode == 0
    assert {str(tmp_path), "", "."}.isdisjoint(json.loads(done.stdout))
    assert str(tmp_path / "other") in json.loads(done.stdout)

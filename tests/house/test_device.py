"""Every command that computes, from the command line, on a second device that computes as the CPU does."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu_model
from benchmarks.common import ROOT
from deepseek_compress.cli import app
from deepseek_compress.compress import convert
from deepseek_compress.planning import device
from tests.house.conftest import Dsc
from tests.streaming.test_device import contents
from tests.strict_device import strict_device

SMALL = ("--samples", "4", "--length", "32")  # enough tokens for a Hessian
TRAINED = ("--steps", "1", "--length", "16", "--set", "distill.documents=4", "--set", "distill.batch_tokens=64")
COMMANDS: dict[str, tuple[str, ...]] = {
    "distill": TRAINED,
    "prune": SMALL,
    "calibrate": SMALL,
    "quantize": (*SMALL, "--group-size", "32"),
    "allocate": (
        *SMALL,
        "--group-size",
        "32",
        "--target",
        "3.9 bits per weight",
        "--set",
        "windows=2",
        "--set",
        "options=[{num_bits: 3}, {num_bits: 4}]",
    ),
    "export": ("--target", "onnxruntime"),
}
OF_THE_RUN = {"dsc_run.json"}  # times
Where = Callable[[str], None]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Where:
    """From now on that device is chosen, whatever is asked for."""
    return lambda name: monkeypatch.setattr(device, "choose", lambda asked: name)


def written(out: Path) -> dict[str, bytes]:
    files = {name: body for name, body in contents(out).items() if Path(name).name not in OF_THE_RUN}
    return {name: body for name, body in files.items() if not name.startswith(".")}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_stage(command: str, dsc: Dsc, here: Where, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    source = () if command == "export" else ("--calibration", text)
    with strict_device() as counts:
        for name in ("cpu", "strict"):
            here(name)
            done = dsc(command, tiny_llama, "-o", tmp_path / name, *source, *COMMANDS[command])
            assert done.exit_code == 0, done.output
        assert counts["copies"]
    mine, theirs = written(tmp_path / "strict"), written(tmp_path / "cpu")
    assert mine.keys() == theirs.keys()
    weights = [name for name in mine if Path(name).suffix in (".safetensors", ".onnx", ".data")]
    assert all(mine[name] == theirs[name] for name in weights)
    if command != "allocate":  # whose gradients add up in another order
        assert {n for n in mine if mine[n] != theirs[n]} <= {"dsc_manifest.json"}, "which says where it was made"


def test_evaluate(dsc: Dsc, here: Where, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    found = []
    options = ("--text", text, "--windows", "2", "--length", "16", "--set", "efficiency=false")
    with strict_device() as counts:
        for name in ("cpu", "strict"):
            here(name)
            out = tmp_path / f"{name}.json"
            assert dsc("evaluate", tiny_llama, "--reference", tiny_llama, "-o", out, *options).exit_code == 0
            found.append([row["metrics"] for row in json.loads(out.read_text())["models"]])
        assert counts["copies"]
    assert found[0] == found[1]


def test_answers(dsc: Dsc, here: Where, tiny_llama: Path) -> None:
    said = []
    with strict_device() as counts:
        for name in ("cpu", "strict"):
            here(name)
            done = dsc("generate", tiny_llama, "--prompt", "3 + 4 =", "--max-tokens", "4", "--json", "--raw")
            said.append(json.loads(done.stdout)["text"])
        assert counts["copies"]
    assert said[0] == said[1]


def test_chat(here: Where, tiny_llama: Path, tmp_path: Path) -> None:
    talker = Path(shutil.copytree(tiny_llama, tmp_path / "talker"))
    (talker / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    said = []
    with strict_device() as counts:
        for name in ("cpu", "strict"):
            here(name)
            words = ["chat", str(talker), "--max-tokens", "3", "--greedy"]
            done = CliRunner().invoke(app, words, input="so is\nthat all\n")
            assert done.exit_code == 0, done.output
            said.append(done.stdout)
        assert counts["copies"]
    assert said[0] == said[1]
    assert len(said[0].splitlines()) == 2, "an answer to each message"


RECIPE = """
model: {model}
calibration: {{sources: [{text}], samples: 4, length: 32}}
stages:
  - compress: {{weights: {{gptq: {{group_size: 32}}}}}}
  - evaluate: {{text: {text}, windows: 2, length: 16, efficiency: false}}
"""


def test_run(dsc: Dsc, here: Where, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    recipe, rows = tmp_path / "both.yaml", []
    recipe.write_text(RECIPE.format(model=tiny_llama, text=text))
    with strict_device() as counts:
        for name in ("cpu", "strict"):
            here(name)
            done = dsc("run", recipe, "-o", tmp_path / name)
            assert done.exit_code == 0, done.output
            rows.append([row["metrics"] for row in json.loads((tmp_path / name / "report.json").read_text())["models"]])
        assert counts["copies"]
    assert rows[0] == rows[1]
    (weights,) = (tmp_path / "cpu" / "compress").glob("*.safetensors")
    assert (tmp_path / "strict" / "compress" / weights.name).read_bytes() == weights.read_bytes()


def test_a_recipe_that_runs_out_of_memory_resumes(
    dsc: Dsc, here: Where, tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line, what is finished stays, and the same command ends with the bytes of one that was not stopped."""
    here("strict")
    words = ("-r", "w4a16", "--calibration", text, *SMALL, "--group-size", "32")
    blocks, run_block = [], convert.run_block

    def short(run: Any, layer: int, *more: Any) -> Any:
        blocks.append(layer)
        if len(blocks) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB\nmore words")
        return run_block(run, layer, *more)

    with strict_device():
        assert dsc("quantize", tiny_llama, "-o", tmp_path / "whole", *words).exit_code == 0
        monkeypatch.setattr(convert, "run_block", short)
        stopped = dsc("quantize", tiny_llama, "-o", tmp_path / "cut", *words)
        assert stopped.exit_code == 1
        (line,) = [line for line in stopped.stderr.splitlines() if line.startswith("error:")]
        assert "strict: its memory ran out" in line
        assert "the same command resumes" in line
        assert "Traceback" not in stopped.output
        resumed = dsc("quantize", tiny_llama, "-o", tmp_path / "cut", *words)
        assert resumed.exit_code == 0, resumed.output
    assert blocks == [0, 1, 1], "what was finished is not done again"
    assert written(tmp_path / "cut") == written(tmp_path / "whole")


def test_a_size_that_is_none(dsc: Dsc, tiny_llama: Path) -> None:
    done = dsc("quantize", tiny_llama, "-o", "out", "--gpu-memory", "much")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: --gpu-memory: invalid size 'much'; write for instance --gpu-memory 8GiB")


@pytest.mark.parametrize(
    ("asked", "what"),
    [("cuda", "--device cuda: "), ("cuda:3", "--device cuda:3: "), ("tpu", "--device tpu: unknown device")],
)
@pytest.mark.parametrize("command", ["quantize", "plan", "generate"])
def test_a_device_that_is_not_there(
    command: str, asked: str, what: str, dsc: Dsc, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    words = {"quantize": ("-o", "out"), "plan": (), "generate": ("--prompt", "x")}[command]
    done = dsc(command, tiny_llama, *words, "--device", asked)
    assert done.exit_code == 1
    (line,) = [line for line in done.stderr.splitlines() if line]
    assert line.startswith(f"error: {what}")
    assert "use " in line


@pytest.mark.verify
@pytest.mark.parametrize("part", ["v3_block,data_free", "nano", "qwen"])
def test_the_benchmark_runs_at_small_sizes(part: str, tmp_path: Path) -> None:
    """On the CPU: what `make bench-gpu` does where a GPU is, but for the sizes."""
    command = [sys.executable, "-m", "benchmarks.gpu_model", "--device", "cpu", "--tiny", "--only", part]
    done = subprocess.run([*command, "--scratch", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["measured"] is False
    assert set(part.split(",")) <= found.keys()
    if part == "nano":
        assert (found["nano"]["codes_that_differ"], found["nano"]["kl_to_each_other"]) == (0.0, 0.0)
        assert min(found["nano"]["kl_to_original"]) > 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--device", "cuda:3"), "error: --device cuda:3: 1 GPU here, the first is cuda:0; use cuda:0 to cuda:0"),
        (("--device", "cuda:0,cpu"), "error: --device cuda:0,cpu: cpu in a list, which names GPUs alone; list"),
        (("--device", "cuda:0,cuda:0"), "error: --device cuda:0,cuda:0: cuda:0 is listed twice; name each GPU once"),
        (
            ("--device", "cuda:0", "--gpu-memory", "1MiB"),
            "error: compress: needs 324.7 MB of cuda:0, which has 1.0 MB for it; give --gpu-memory 0.4GiB, or use",
        ),
    ],
)
def test_where_one_gpu_is(
    words: tuple[str, ...], line: str, dsc: Dsc, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 2 << 30))
    done = dsc("plan", tiny_llama, "--group-size", "32", *words)
    assert done.exit_code == 1
    (found,) = [line for line in done.stderr.splitlines() if line]
    assert found.startswith(line)


@pytest.mark.parametrize(("built", "why"), [(None, "was built without CUDA"), ("13.0", "no NVIDIA driver, or no GPU")])
def test_why_there_is_none(
    built: str | None, why: str, dsc: Dsc, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built)
    done = dsc("quantize", tiny_llama, "-o", "out", "--device", "cuda")
    assert done.exit_code == 1
    assert why in done.stderr
    assert not Path("out").exists()


def test_packages_that_the_benchmark_lacks_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In one line, before anything is written; `make bench-gpu` goes on, since it needs torch alone but for this."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in ("blake3", "pydantic") else find(n))
    monkeypatch.setattr(sys, "argv", ["gpu_model", "--device", "cpu", "--tiny"])
    gpu_model.main()
    said, record = capsys.readouterr().out.splitlines()
    assert said.startswith("gpu_model: not measured, missing: pydantic, blake3; pip install pydantic blake3")
    assert json.loads(record)["measured"] is False


def test_the_benchmarks_begin_with_torch_alone() -> None:
    """None of the packages that the library needs is imported."""
    missing = f"sys.modules.update(dict.fromkeys({(*gpu_model.NEEDED, 'onnx', 'deepseek_compress.cli')!r}))"
    names = ("gpu_softmax", "gpu_pack", "gpu_model")
    each = "; ".join(f"import benchmarks.{name} as it; it.main()" for name in names)
    code = f"import sys, torch; {missing}; sys.argv = ['it']; {each}"
    none = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, env=none)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [line for line in done.stdout.splitlines() if line[0] != "{"] == [
        f"{name}: not measured, no CUDA device" for name in names
    ]


def test_without_a_gpu_nothing_is_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu_model"])
    gpu_model.main()
    said, record = capsys.readouterr().out.splitlines()
    assert said == "gpu_model: not measured, no CUDA device"
    assert json.loads(record)["measured"] is False

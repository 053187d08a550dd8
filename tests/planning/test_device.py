"""What the user asks for, what is there, and one line where the two differ."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_compress import pipeline
from deepseek_compress.errors import DscError
from deepseek_compress.planning import device
from deepseek_compress.recipe import parse_recipe


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 2 << 30))


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.choose("auto") == device.choose("cpu") == "cpu"
    with pytest.raises(DscError, match=r"--device cuda:0: .*; use --device cpu"):
        device.choose("cuda:0")
    with pytest.raises(DscError, match="unknown device"):
        device.choose("tpu")


def test_with_two(two_gpus: None) -> None:
    assert device.choose("auto") == device.choose("cuda") == "cuda:0"
    assert device.choose("cuda:1") == "cuda:1"
    assert device.choose("cpu") == "cpu"
    with pytest.raises(DscError, match="2 GPU here"):
        device.choose("cuda:2")


def test_too_little_memory_is_named_by_plan(two_gpus: None, tiny_llama: Path) -> None:
    recipe = parse_recipe(f"model: {tiny_llama}\nstages:\n  - compress: {{weights: gptq}}\n", "r.yaml")
    small = pipeline.Options(device="cuda:1", gpu_memory=1 << 20)
    (problem,) = pipeline.plan(recipe, small).problems
    assert "of cuda:1, which has" in problem.what and "--device cpu" in problem.fix
    assert pipeline.plan(recipe, pipeline.Options(device="cuda:1")).problems == []


def test_memory_that_runs_out_is_one_line() -> None:
    with (
        pytest.raises(DscError, match=r"cuda:0: its memory ran out .*the same command resumes"),
        device.memory_errors("cuda:0"),
    ):
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

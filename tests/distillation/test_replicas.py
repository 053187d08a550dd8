"""Two processes that train together give what one gives; a process that is lost is one line, and nothing is lost."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_compress import processes
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.distillation import replicas
from deepseek_compress.distillation import resume as resuming
from deepseek_compress.distillation.group import Group
from deepseek_compress.errors import DscError
from deepseek_compress.models.runtime import Model
from tests.distillation.test_distill import context, stage, text

__all__ = ["text"]  # a fixture


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(path: Path) -> dict[str, Tensor]:
    return dict(Model.load(path).weights)


def test_one_process_has_every_part_and_adds_nothing() -> None:
    leaf = torch.ones(2, requires_grad=True)
    assert Group().mine([1, 2, 3]) == [1, 2, 3]
    assert Group(1, 2, alone=True).mine([1, 2, 3]) == [2]
    assert Group().add_up([leaf], 3.0) == 3.0
    assert leaf.grad is None


@pytest.mark.parametrize("knobs", [{}, {"lora": {"rank": 4}}], ids=["weights", "lora"])
def test_two_processes_give_the_curve_of_one(
    knobs: dict[str, object], tiny_v3_bf16: Path, text: Path, tmp_path: Path
) -> None:
    """Experts that one part alone reaches have a gradient in one process only."""
    source = open_checkpoint(tiny_v3_bf16)
    common = {"steps": 4, "batch_tokens": 400, "loss": "cross_entropy", "learning_rate": 3e-3, **knobs}
    one = stage(accumulate=2, **common).run(source, context(tmp_path / "one", tiny_v3_bf16, text))
    two = stage(processes=2, **common).run(source, context(tmp_path / "two", tiny_v3_bf16, text))

    assert two.facts["losses"] == pytest.approx(one.facts["losses"], rel=1e-6)
    assert two.facts["validation"] == [pytest.approx(point, rel=1e-5) for point in one.facts["validation"]]
    first, second = weights(one.path), weights(two.path)
    assert max(float((first[name] - second[name]).abs().max()) for name in first) < 1e-4
    assert not list(two.path.glob(".dsc*"))


def test_a_lost_process_is_one_line_and_the_same_command_resumes(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    monkeypatch.setattr(resuming, "LARGEST_SHARE", 1e9)
    wanted, source = stage(steps=5, batch_tokens=400, processes=2), open_checkpoint(tiny_llama)
    whole = wanted.run(source, context(tmp_path / "whole", tiny_llama, text))
    given = context(tmp_path / "lost", tiny_llama, text)
    started: list[processes.Workers] = []

    class Known(processes.Workers):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            started.append(self)

    def kill(done: int, total: int, note: str) -> None:
        if done == 3 and note.startswith("loss"):
            for process in (started[-1]._pool._processes or {}).values():
                assert process.pid is not None
                os.kill(process.pid, signal.SIGKILL)

    monkeypatch.setattr(replicas.processes, "Workers", Known)
    with pytest.raises(DscError, match=r"a training process was (lost|killed)"):
        wanted.run(source, replace(given, progress=kill))
    assert not (given.out / "config.json").exists()

    with pytest.raises(DscError, match="unfinished run with other knobs"):
        wanted.model_copy(update={"processes": 1}).run(source, given)
    again = wanted.run(source, given)

    assert again.facts["losses"] == whole.facts["losses"]
    assert all((again.path / f.name).read_bytes() == f.read_bytes() for f in whole.path.glob("*.safetensors"))


def test_an_error_of_another_process_is_said(
    tiny_llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each reads the files for itself: what is wrong with them there ends the training here."""
    monkeypatch.setattr(replicas, "_prepare", _refuse)
    with pytest.raises(DscError, match="no memory for another student"):
        stage(steps=2, batch_tokens=400, processes=2).run(
            open_checkpoint(tiny_llama), context(tmp_path / "out", tiny_llama, text)
        )


def _refuse(*arguments: object) -> None:
    raise DscError("no memory for another student", "")

"""Several devices that share one run: the bytes of one, whatever their number, and each computes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from deepseek_compress import workers
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.planning.device import Place
from deepseek_compress.registry import build
from deepseek_compress.stages import load
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.resumable import Resumable
from deepseek_compress.workers import open_pool
from tests.streaming.test_device import COMPRESSIONS, contents, context
from tests.strict_device import strict_device

TWO = ("strict:0", "strict:1")
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "text": ("tiny_v3", "compress", COMPRESSIONS["gptq"]),
    "paired": ("tiny_v2", "compress", COMPRESSIONS["gptaq"]),
    "without": ("tiny_v3", "compress", {"weights": {"rtn": {"group_size": 32}}}),
    "statistics": ("tiny_v2", "calibrate", {}),
}
QUICK = ("without",)


@pytest.fixture(autouse=True)
def in_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have the devices too."""
    monkeypatch.setattr(workers, "_PRELOAD", (*workers._PRELOAD, "tests.strict_worker"))


@pytest.mark.parametrize(
    "what", [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.verify]) for name in RUNS]
)
def test_the_same_bytes_on_one_and_on_two(
    what: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deepseek_compress.compress.data_free.SMALLEST", 100_000)
    name, kind, knobs = RUNS[what]
    source, stage = open_checkpoint(request.getfixturevalue(name)), build(load(kind), knobs, kind)
    with strict_device():
        for devices in (TWO[:1], TWO):
            asked = context(tmp_path / str(len(devices)), text, devices[0])
            stage.run(source, Context(**{**vars(asked), "devices": devices}))
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@pytest.mark.verify
def test_what_two_began_one_of_them_ends(tiny_v2: Path, text: Path, tmp_path: Path) -> None:
    """The identity of a run knows the kind of a device, not their number."""
    stage = build(load("compress"), COMPRESSIONS["gptq"], "compress")

    def stop(done: int, total: int, note: str) -> None:
        if note == "block 2":
            raise KeyboardInterrupt

    with strict_device():
        stage.run(open_checkpoint(tiny_v2), context(tmp_path / "whole", text, "strict:0"))
        cut = vars(context(tmp_path / "cut", text, "strict:0"))
        with pytest.raises(KeyboardInterrupt):
            stage.run(open_checkpoint(tiny_v2), Context(**{**cut, "devices": TWO, "progress": stop}))
        stage.run(open_checkpoint(tiny_v2), Context(**{**cut, "device": "strict:1"}))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


class Shared(NamedTuple):
    """What tasks share, on a device; `lives`: how often a worker dies of it."""

    device: str
    lives: Path

    def at(self, device: str) -> Shared:
        return self._replace(device=device)


def where(shared: Shared, task: int) -> tuple[int, int]:
    """The task, and the device that its sum is on."""
    if task == 3 and shared.lives.read_text():
        shared.lives.write_text(shared.lives.read_text()[1:])
        os.kill(os.getpid(), signal.SIGKILL)
    made = torch.ones(3, device=shared.device) + task
    assert made.device.type == "strict"
    return int(made[0]) - 1, made.device.index


def test_each_device_has_one_worker_also_when_one_is_lost(tmp_path: Path) -> None:
    lives = tmp_path / "lives"
    lives.write_text("x")
    with open_pool(Shared("strict:0", lives), places=[Place.of(name) for name in TWO]) as pool:
        assert (pool.count, pool.here) == (2, False)
        found = list(pool.run(where, list(range(24))))
    assert [task for task, _ in found] == list(range(24))
    assert {device for _, device in found} == {0, 1}
    assert lives.read_text() == ""


def test_a_worker_with_another_kind_of_device(tmp_path: Path) -> None:
    with pytest.raises(DscError, match="a worker has strict, the run another; compute on GPUs of one kind"):
        Place("strict:0", None, "another").begin(Shared("strict:0", tmp_path))


def test_the_identity_of_a_run_knows_the_kind_alone(tiny_llama: Path) -> None:
    first, second, cpu = (Resumable.of(open_checkpoint(tiny_llama), {}, None, device=name) for name in (*TWO, "cpu"))
    assert first == second != cpu


def test_tensors_of_two_devices_do_not_mix() -> None:
    with strict_device() as counts:
        first, second = (torch.ones(2, device=name) for name in TWO)
        with pytest.raises(RuntimeError, match="strict:0 and on strict:1"):
            first + second
        assert (first + second.to(TWO[0])).tolist() == [2.0, 2.0]
        assert counts["copies"] == 1

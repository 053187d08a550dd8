"""What the user asks for, what is there, and one line where the two differ."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch

from deepseek_compress import doctor, pipeline
from deepseek_compress.cli.show import _planned
from deepseek_compress.errors import DscError
from deepseek_compress.jobs import bytes_of, options
from deepseek_compress.planning import device, rates
from deepseek_compress.planning.costs import Rates
from deepseek_compress.recipe import parse_recipe
from tests.strict_device import SYNCHRONIZED, strict_device


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
    with pytest.raises(DscError, match="2 GPU here, the first is cuda:0; use cuda:0 to cuda:1"):
        device.choose("cuda:2")


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ("cuda:0,cuda:2", "--device cuda:2: 2 GPU here, the first is cuda:0; use cuda:0 to cuda:1"),
        ("cuda:0,cuda:0", "--device cuda:0,cuda:0: cuda:0 is listed twice; name each GPU once"),
        ("cuda,cuda:0", "--device cuda,cuda:0: cuda:0 is listed twice; name each GPU once"),
        ("cuda:0,cpu", "--device cuda:0,cpu: cpu in a list, which names GPUs alone; list cuda:N,cuda:M, or"),
        ("cuda:0,", "--device cuda:0,: nothing in a list, which names GPUs alone"),
        ("cuda:0,cuda:1", "--device cuda:0,cuda:1: GPUs of several kinds, large, small; list GPUs of one kind"),
    ],
)
def test_lists_that_are_refused(two_gpus: None, asked: str, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: {"cuda:0": "large", "cuda:1": "small"}[device])
    with pytest.raises(DscError) as caught:
        device.choose_all(asked)
    assert str(caught.value).startswith(what)


def test_a_list(two_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    assert device.choose_all("cuda:1,cuda:0") == ("cuda:1", "cuda:0")
    assert device.choose_all("cpu") == ("cpu",)
    both = options("cuda:1,cuda:0")
    assert (both.device, both.devices) == ("cuda:1", ("cuda:1", "cuda:0"))
    assert options("cuda:1").devices == ("cuda:1",)
    assert options("auto", ray="x").devices == ("cpu",), "a cluster's GPUs are asked for"
    assert options("cuda", ray="x").devices == ("cuda:0",)
    for more in ({"ray": "x"}, {"workers": 2}):
        with pytest.raises(DscError, match="and --device cuda:0,cuda:1 together"):
            options("cuda:0,cuda:1", **more)  # type: ignore[arg-type]


def test_the_plan_of_two(two_gpus: None, tiny_v3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    stage = "compress: {weights: {gptq: {group_size: 32}}}"
    recipe = parse_recipe(f"model: {tiny_v3}\nstages:\n  - {stage}\n", "r.yaml")
    wanted, rate = options("cuda:0,cuda:1"), Rates(*[1.0] * 8)
    found = pipeline.plan(recipe, wanted)
    row = _planned(found, recipe.steps[0], rate)
    assert (row["device"], row["workers"]) == ("cuda:0,cuda:1", 2)
    (forecast,) = found.forecasts.values()
    assert forecast.seconds(rate, 2, 2) < forecast.seconds(rate, 1)  # type: ignore[operator]
    little = {"cuda:0": 1 << 30, "cuda:1": 1 << 20}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (little[device], 2 << 30))
    (problem,) = pipeline.plan(recipe, wanted).problems
    assert "of cuda:1, which has" in problem.what


def test_doctor_names_all(two_gpus: None) -> None:
    assert doctor._device("cuda:0", 2) == "cuda:0 (auto; --device to set; --device cuda:0,cuda:1 for all)"
    assert doctor._device("cpu", 0) == "cpu (auto; --device to set)"


def test_too_little_memory_is_named_by_plan(two_gpus: None, tiny_llama: Path) -> None:
    recipe = parse_recipe(f"model: {tiny_llama}\nstages:\n  - compress: {{weights: gptq}}\n", "r.yaml")
    small = pipeline.Options(device="cuda:1", gpu_memory=1 << 20)
    (problem,) = pipeline.plan(recipe, small).problems
    assert "of cuda:1, which has" in problem.what and "--device cpu" in problem.fix
    fits = problem.fix.split("--gpu-memory ")[1].split(",")[0]
    assert not pipeline.plan(recipe, pipeline.Options(device="cuda:1", gpu_memory=bytes_of(fits))).problems
    assert pipeline.plan(recipe, pipeline.Options(device="cuda:1")).problems == []


def test_a_gpu_that_others_fill(two_gpus: None, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 20, 2 << 30))
    recipe = parse_recipe(f"model: {tiny_llama}\nstages:\n  - compress: {{weights: gptq}}\n", "r.yaml")
    (problem,) = pipeline.plan(recipe, pipeline.Options(device="cuda:0")).problems
    assert re.search(r"free \S+ MB of it, or take another, or use --device cpu", problem.fix)


def test_each_device_has_rates_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    measured = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    monkeypatch.setattr(rates, "_measured", lambda where: measured.append(where) or Rates(*[len(measured)] * 8))
    assert rates.rates(device="cuda:0") is None
    assert rates.rates(measure=True) == Rates(*[1] * 8)
    assert rates.rates(device="cuda:0") is None, "the processor's are not the GPU's"
    assert rates.rates(measure=True, device="cuda:0") == Rates(*[2] * 8)
    assert rates.rates(device="cuda:1") == Rates(*[2] * 8), "a GPU of the same name"
    assert rates.rates() == Rates(*[1] * 8)
    assert measured == ["cpu", "cuda:0"]


def test_rates_are_measured_where_it_computes() -> None:
    with strict_device() as counts:
        before = SYNCHRONIZED.total()
        assert rates._rate(1.0, lambda: None, "strict", 0.0) >= 0
        assert SYNCHRONIZED.total() > before
        x = torch.randn(4, 4).to("strict")
        assert counts["copies"] == 1
        assert x.device.type == "strict"


def test_operators_that_are_not_repeatable_are_told() -> None:
    told: list[str] = []

    def compute(where: str, *names: str) -> bool:
        with device.repeatable(where, told.append):
            for name in names:
                what = f"{name} does not have a deterministic implementation, but you set 'torch.use_determ...'"
                warnings.warn(what, UserWarning, stacklevel=1)
            warnings.warn("another thing", UserWarning, stacklevel=1)
            return torch.are_deterministic_algorithms_enabled()

    with pytest.warns(UserWarning, match="another thing"):
        assert compute("cuda:0", "cumsum_cuda_kernel", "cumsum_cuda_kernel", "kthvalue CUDA")
    (line,) = told
    assert line.endswith("on cuda:0: torch has no deterministic cumsum_cuda_kernel, kthvalue CUDA")
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.warns(UserWarning, match="another thing"):
        assert not compute("cpu")
    assert len(told) == 1


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("tried to allocate 3 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling it"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    ],
)
def test_memory_that_runs_out_is_one_line(error: RuntimeError) -> None:
    with (
        pytest.raises(DscError, match=r"cuda:0: its memory ran out .*the same command resumes"),
        device.memory_errors("cuda:0"),
    ):
        raise error


def test_other_errors_of_a_device_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="illegal memory access"), device.memory_errors("cuda:0"):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

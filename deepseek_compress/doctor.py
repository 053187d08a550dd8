"""Capabilities of this machine, and how to get the rest."""

from __future__ import annotations

import shutil
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

from deepseek_compress import machine


class Check(NamedTuple):
    """One line of the answer. `good` is None where a thing is missing that is not needed."""

    name: str
    good: bool | None
    found: str
    how: str = ""  # to get it, or what works without it


class Package(NamedTuple):
    """A distribution, what it is for, and how to get it; `needed` ones come with the package itself."""

    name: str
    purpose: str
    how: str
    needed: bool


_EXTRA = "pip install 'deepseek-compress[{}]'"
_PACKAGES = (
    Package("transformers", "tokenizers, reference models", "pip install transformers", True),
    Package("onnx", "export to ONNX", "pip install onnx", True),
    Package("onnxruntime-gpu|onnxruntime", "running ONNX", "pip install onnxruntime", True),
    Package("tensorrt-rtx-cu13", "engines, built without a GPU", _EXTRA.format("tensorrt-rtx"), False),
    Package("tensorrt-cu13|tensorrt", "datacenter engines, built on a GPU", _EXTRA.format("tensorrt"), False),
    Package("ray", "workers on many machines", _EXTRA.format("ray"), False),
    Package(
        "onnxruntime-genai",
        "folders of target genai",
        "in an environment of its own: pip install onnxruntime-genai",
        False,
    ),
    Package("gguf", "files for llama.cpp", _EXTRA.format("gguf"), False),
    Package("xllamacpp", "running them: llama.cpp", _EXTRA.format("llama-cpp"), False),
    Package("pyarrow", "calibration text in Parquet", _EXTRA.format("parquet"), False),
    Package("nvidia-modelopt", "NVIDIA's methods, named modelopt_...", _EXTRA.format("modelopt"), False),
    Package("compressed-tensors", "checking our files as others load them", _EXTRA.format("dev"), False),
)


def examine(where: Path = Path()) -> list[Check]:
    """Every check; `where` is the directory whose disk counts."""
    return [*_system(where), *_compute(), *(_package(package) for package in _PACKAGES)]


def _system(where: Path) -> list[Check]:
    python = ".".join(str(part) for part in sys.version_info[:3])
    host = machine.describe()
    memory, free = host["memory_bytes"], machine.free_disk(where.resolve())
    fast = [flag for flag in host["simd"] if flag in {"avx2", "avx512f"}]
    return [
        Check("Python", sys.version_info >= (3, 10), python, "Python 3.10 or later"),
        Check("CPU", True, f"{host['cpu']}, {host['cores']} cores"),
        Check(
            "CPU instructions", bool(fast) or None, " ".join(host["simd"]) or "none of avx2, avx512", "slower kernels"
        ),
        Check("memory", (memory or 0) > 4e9, f"{(memory or 0) / 1e9:.1f} GB", "4 GB run the built-in model"),
        Check("free disk", free > 2e9, f"{free / 1e9:.1f} GB", "2 GB for the quickstart"),
    ]


def _compute() -> list[Check]:
    import torch

    from deepseek_compress.planning.device import choose

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    compiler = next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)
    nvcc = shutil.which("nvcc")
    return [
        Check("torch", True, torch.__version__),
        Check("GPU", bool(gpus) or None, ", ".join(gpus) or "none", "everything but running engines works without"),
        Check("device", True, _device(choose("auto"), len(gpus))),
        Check(
            "C++ compiler", bool(compiler) or None, compiler or "none", "install g++; the reference path runs without"
        ),
        Check("CUDA compiler", bool(nvcc) or None, nvcc or "none", "CUDA toolkit; only GPU kernels need it"),
    ]


def _device(chosen: str, gpus: int) -> str:
    several = f"; --device {','.join(f'cuda:{i}' for i in range(gpus))} for all" if gpus > 1 else ""
    return f"{chosen} (auto; --device to set{several})"


def _package(package: Package) -> Check:
    for name in package.name.split("|"):
        try:
            return Check(name, True, f"{version(name)} ({package.purpose})")
        except PackageNotFoundError:
            continue
    missing = f"not installed ({package.purpose})"
    return Check(package.name.split("|")[0], False if package.needed else None, missing, package.how)

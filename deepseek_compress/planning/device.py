"""Which device computes: what the user asks for, what this machine has, and what to do where the two differ."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from deepseek_compress.errors import DscError

CPU = "cpu"
ELSEWHERE = 8 << 30  # bytes of a device that torch does not tell about
_NOT_DETERMINISTIC = re.compile(r"(.+?) does not have a deterministic implementation")


def choose(name: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` -> the device as torch names it. Raises DscError for one that is not here."""
    found = re.fullmatch(r"cuda(?::(\d+))?", name)
    if name == CPU or (name == "auto" and not torch.cuda.is_available()):
        return CPU
    if name != "auto" and found is None:
        raise DscError(f"--device {name}: unknown device", "use auto, cpu, cuda or cuda:N")
    if not torch.cuda.is_available():
        raise DscError(f"--device {name}: {_missing()}", "use --device cpu, or leave it out")
    number = int(found[1] or 0) if found else 0
    if number >= torch.cuda.device_count():
        here = f"{torch.cuda.device_count()} GPU here"
        raise DscError(f"--device {name}: {here}, the first is cuda:0", f"use cuda:0 to cuda:{number - 1} at most")
    return f"cuda:{number}"


def _missing() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    return "no NVIDIA driver, or no GPU that it knows"


def memory(device: str) -> int | None:
    """Bytes of free memory on a GPU; None on the CPU."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else None


def memory_limit(device: torch.device) -> int:
    """Bytes that this process may use of a device: all of a GPU's, but for `--gpu-memory`."""
    if device.type != "cuda":
        return ELSEWHERE
    total = torch.cuda.get_device_properties(device).total_memory
    return int(total * torch.cuda.get_per_process_memory_fraction(device))


def memory_in_use(device: torch.device) -> int:
    """Bytes of tensors on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def key(device: str) -> str:
    """The kind of a device, for what was measured on it: two GPUs of one name are alike."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def bound_memory(device: str, limit: int | None) -> None:
    """Use no more than `limit` bytes of a GPU."""
    if limit is not None and device.startswith("cuda"):
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def told(device: str) -> str:
    """One line about the device."""
    if not device.startswith("cuda"):
        return f"device {device}"
    return f"device {device}: {torch.cuda.get_device_name(device)}"


def synchronize(device: torch.device | str) -> None:
    """Wait for all that was asked of `device`: before a clock is read."""
    torch.get_device_module(torch.device(device)).synchronize(torch.device(device))


@contextmanager
def memory_errors(device: str) -> Iterator[None]:
    """Turn the end of a GPU's memory into the user's error; what was finished before stays."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        what = f"{device}: its memory ran out ({str(error).splitlines()[0][:120]})"
        fix = "free memory on it, or give less text or --gpu-memory; the same command resumes"
        raise DscError(what, fix) from None


@contextmanager
def repeatable(device: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Inside, a GPU computes the same bits each time, where torch knows how; tell the operators where it does not.

    A CPU does so anyway, with the same number of threads.
    """
    if not device.startswith("cuda"):
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    filled = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = filled
    found: dict[str, None] = {}
    for each in caught:
        if match := _NOT_DETERMINISTIC.search(str(each.message)):
            found[match[1]] = None
        else:
            warnings.warn_explicit(each.message, each.category, each.filename, each.lineno)
    if found:
        tell(f"not the same bits each time on {device}: torch has no deterministic {', '.join(found)}")


@contextmanager
def careful(device: str, tell: Callable[[str], None]) -> Iterator[None]:
    """Both: `memory_errors`, and `repeatable`."""
    with memory_errors(device), repeatable(device, tell):
        yield

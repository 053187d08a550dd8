"""Which device computes: what the user asks for, what this machine has, and what to do where the two differ."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from deepseek_compress.errors import DscError
from deepseek_compress.planning.costs import STATES

CPU = "cpu"
ELSEWHERE = 8 << 30  # bytes of a device that torch does not tell about
_NO_MEMORY = re.compile(r"CUDA error: out of memory|CU\w+_STATUS_ALLOC_FAILED")  # what a library could not allocate
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
        fix = f"use cuda:0 to cuda:{torch.cuda.device_count() - 1}"
        raise DscError(f"--device {name}: {here}, the first is cuda:0", fix)
    return f"cuda:{number}"


def choose_all(names: str) -> tuple[str, ...]:
    """`cuda:0,cuda:1` -> each of them, else what `choose` gives. Raises DscError for GPUs that cannot share one run."""
    listed = [name.strip() for name in names.split(",")]
    if len(listed) == 1:
        return (choose(names),)
    others = [name for name in listed if not name.startswith("cuda")]
    if others:
        what = f"--device {names}: {others[0] or 'nothing'} in a list, which names GPUs alone"
        raise DscError(what, "list cuda:N,cuda:M, or name one device")
    chosen = tuple(choose(name) for name in listed)
    if twice := [name for name in chosen if chosen.count(name) > 1]:
        raise DscError(f"--device {names}: {twice[0]} is listed twice", "name each GPU once")
    if len(kinds := dict.fromkeys(map(key, chosen))) > 1:  # whose roundings differ
        raise DscError(f"--device {names}: GPUs of several kinds, {', '.join(kinds)}", "list GPUs of one kind")
    return chosen


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
    """Identify the kind of a device, for what was measured or computed on it: two GPUs of one name are alike."""
    there = device.startswith("cuda") and torch.cuda.is_available()
    return torch.cuda.get_device_name(device) if there else device.split(":")[0]


def bound_memory(device: str, limit: int | None) -> None:
    """Use no more than `limit` bytes of a GPU."""
    if limit is not None and device.startswith("cuda"):
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)


def release(device: torch.device) -> None:
    """Give what torch keeps of a GPU's freed memory to other processes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Place(NamedTuple):
    """A GPU as the worker process has it that computes there: see `workers.Place`."""

    device: str
    limit: int | None  # bytes that the worker may use of it
    kind: str  # that the run's bytes follow from

    @classmethod
    def of(cls, device: str) -> Place:
        """Return a GPU of this machine; the run itself keeps its share for hidden states."""
        return cls(device, int((1 - STATES) * memory_limit(torch.device(device))), key(device))

    def begin(self, shared: Any) -> Any:
        """`shared` of this place; the process computes on it from now on. DscError where it is of another kind."""
        if self.device.startswith("cuda"):
            choose(self.device)
            torch.cuda.set_device(self.device)
        if (here := key(self.device)) != self.kind:
            raise DscError(f"a worker has {here}, the run {self.kind}", "compute on GPUs of one kind")
        bound_memory(self.device, self.limit)
        return _at(shared, self.device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Inside a task is computed."""
        with careful(self.device, lambda line: None):  # the run says the line itself, of the same operators
            yield


def _at(shared: Any, device: str) -> Any:
    """Move what tasks share to `device`: a run, or several of them."""
    return tuple(_at(each, device) for each in shared) if type(shared) is tuple else shared.at(device)


def describe(device: str) -> str:
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
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and not _NO_MEMORY.search(str(error)):
            raise
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

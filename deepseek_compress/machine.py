"""Facts of this machine, and the memory that a run takes."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile")


def describe() -> dict[str, Any]:
    """Return the host in words and numbers; nothing that identifies it."""
    model, flags = _cpu()
    return {
        "cpu": model,
        "cores": cores(),
        "memory_bytes": memory(),
        "simd": [flag for flag in FLAGS if flag in flags],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def exact_integer_products() -> bool:
    """Whether 8-bit products add up in 32 bits: not where an x86 processor has AVX2 and no VNNI."""
    return bool(_cpu()[1] & {"avx512_vnni", "avx_vnni"}) or platform.machine() not in ("x86_64", "AMD64")


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def busy() -> str | None:
    """Say that times taken now are those of a busy machine; None where a core is left."""
    load, here = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, cores()
    if load < here + 1:  # our own work counts for one
        return None
    return f"measured while this machine was busy (load {load:.1f} on {here} cores): run --measure again when it is not"


def memory() -> int | None:
    """Bytes of memory in the machine, the limit of its control group included."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def free_disk(path: Path) -> int:
    """Free bytes where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def settle() -> None:
    """Prepare this process for long work over large tensors.

    It reuses the memory it frees: the C library maps every large block anew, so that each of its pages costs a fault, a
    third of the time of a run (elsewhere than with glibc it stays as it is). And the search for cycles leaves alone
    what there is by now, the 200,000 objects that imports made.
    """
    gc.freeze()
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "mallopt"):
            library.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
            library.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def return_freed_memory() -> None:
    """Give back what was kept since `settle`: between parts of a run that need much and little."""
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if hasattr(library, "malloc_trim"):
            library.malloc_trim(0)


@contextmanager
def peak_memory(every: float = 0.5) -> Iterator[list[int | None]]:
    """Watch the run: item 0 is at the end the largest sum of PSS over this process and its children, in bytes.

    PSS counts a page that n processes share 1/n times each. None where the system does not tell it.
    """
    peak: list[int | None] = [resident()]
    over = threading.Event()

    def watch() -> None:
        pause = every
        while not over.wait(pause):
            began = time.perf_counter()
            peak[0] = max(peak[0] or 0, resident() or 0) or None
            pause = max(every, 60 * (time.perf_counter() - began))  # summing the pages of large processes takes time

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()
        peak[0] = max(peak[0] or 0, resident() or 0) or None


def _cpu() -> tuple[str, set[str]]:
    """Name and feature flags of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    return fields.get("model name", platform.machine()), set(fields.get("flags", fields.get("Features", "")).split())


def resident(root: int | None = None) -> int | None:
    """Sum of PSS over process `root` (default: this one) and all below it, in bytes; None where it is not known."""
    total = 0
    for pid in _family(root or os.getpid()):
        try:
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
        except OSError:
            continue  # ended meanwhile
        total += sum(int(row.split()[1]) for row in text.splitlines() if row.startswith("Pss:")) * 1024
    return total or None


def _family(pid: int) -> list[int]:
    found = [pid]
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            found += _family(int(child))
    return found


def cache() -> Path:
    """Where what was measured here is kept."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "deepseek_compress"

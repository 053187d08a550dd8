"""Rates of this machine, measured in ten seconds and kept, so that `dsc plan` can predict times.

Each device has rates of its own. A GPU's workers are one process, so that what one thread does there is what all do.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from cuda_ops import ops
from deepseek_compress import machine
from deepseek_compress.checkpoint.files import hash_file
from deepseek_compress.checkpoint.shards import ShardFile
from deepseek_compress.numerics import WEIGHTS
from deepseek_compress.numerics.types import Statistics
from deepseek_compress.planning.costs import Rates
from deepseek_compress.planning.device import CPU, synchronize
from deepseek_compress.planning.device import key as kind
from deepseek_compress.processes import run_python
from deepseek_compress.workers import one_thread

_FILE = 256 << 20  # bytes that the disk is measured with


def rates(measure: bool = False, device: str = CPU) -> Rates | None:
    """Return this machine's with what `device` computes; None before the first `measure`, which takes 10 s.

    They are kept in the user's cache directory for this processor, number of cores and threads, and kind of GPU.
    """
    kept = machine.cache() / "rates.json"
    key = f"{machine.describe()['cpu']} x {machine.cores()}, {torch.get_num_threads()} threads"
    key += "" if device == CPU else f", {kind(device)}"
    try:
        known = json.loads(kept.read_text())
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    if measure:
        known[key] = _measured(device)._asdict()
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(known, indent=2))
    found = known.get(key)
    return Rates(**found) if isinstance(found, dict) and found.keys() == set(Rates._fields) else None


def _measured(device: str) -> Rates:
    many = _products(device)
    with one_thread():
        one = _products(device) if device == CPU else many
        solved = _solved(one, device)
    read, written, packed = _files(device)
    return Rates(many, one, _touched(device), solved, packed, read, written, _start())


def _rate(work: float, run: Callable[[], object], device: str, seconds: float = 1.0) -> float:
    """Work in a second, over about `seconds`, after one run that counts for nothing."""
    run()
    synchronize(device)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        run()
        synchronize(device)
        count += 1
    return count * work / (time.perf_counter() - began)


def _products(device: str) -> float:
    """Operations of float32 products of the size that a block has."""
    rows = 1024 if device == CPU else 4096  # what fills it
    left, right = torch.randn(rows, 2048).to(device), torch.randn(2048, 2048).to(device)
    return _rate(2.0 * rows * 2048 * 2048, lambda: left @ right, device)


def _touched(device: str) -> float:
    """Bytes read and written by operations on single elements."""
    x = torch.randn(8 << 20).to(device)
    return _rate(2.0 * x.nbytes, lambda: x.mul(1.5), device, 0.5)


def _solved(products: float, device: str) -> float:
    """Weights a second that the solver rounds, once the time of its products is taken off."""
    rows, columns = 512, 2048
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(device)
    x = torch.randn(2 * columns, columns, generator=generator).to(device)
    method, statistics = WEIGHTS["gptq"].model_validate({"group_size": 128}), Statistics(len(x), x.T @ x)
    prepared = method.prepare(statistics)
    each = rows * columns / _rate(rows * columns, lambda: method(weight, prepared), device)
    return rows * columns / max(each - rows * columns**2 / products, 0.1 * each)


def _files(device: str) -> tuple[float, float, float]:
    """Bytes read from the disk, bytes written and synced, weights packed from a cached file into a finished shard."""
    with tempfile.TemporaryDirectory() as directory:
        source = Path(directory) / "source"
        weight = torch.randn(1024, 8192).bfloat16()
        began = time.perf_counter()
        with open(source, "wb", buffering=0) as file:
            for _ in range(_FILE // weight.nbytes):
                file.write(weight.view(torch.uint8).numpy().data)
            os.fsync(file.fileno())
        written = _FILE / (time.perf_counter() - began)
        with one_thread():
            ops.pack_weights(weight.to(device), group_size=128)
            began = time.perf_counter()
            _pack(source, Path(directory) / "shard", weight, device)
            packed = _FILE / weight.element_size() / (time.perf_counter() - began)
        began = time.perf_counter()
        _drop(source)
        with open(source, "rb", buffering=0) as file:
            while file.read(8 << 20):
                pass
        return _FILE / (time.perf_counter() - began), written, packed


def _pack(source: Path, target: Path, like: torch.Tensor, device: str) -> None:
    """Do what a data-free task does with a file: read, pack, write, read back, and hash both."""
    shard = ShardFile(target)
    buffer = torch.empty_like(like)
    with open(source, "rb", buffering=0) as file:
        for i in range(_FILE // like.nbytes):
            file.readinto(buffer.view(torch.uint8).numpy().data)
            packed = ops.pack_weights(buffer.to(device), group_size=128)
            shard.add(f"{i}.packed", packed.packed.cpu())
            shard.add(f"{i}.scale", packed.scale.cpu())
    hash_file(source)
    shard.close()


def _drop(file: Path) -> None:
    """Out of the page cache, where the system lets one ask for it."""
    if hasattr(os, "posix_fadvise"):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _start() -> float:
    """Seconds that a command takes before its stage begins."""
    began = time.perf_counter()
    code = "import deepseek_compress.pipeline, deepseek_compress.stages, deepseek_compress.cli.work, transformers"
    run_python("-c", code).check_returncode()
    return time.perf_counter() - began

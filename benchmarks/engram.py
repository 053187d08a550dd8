"""What four bits cost an Engram table, and how fast its rows are rounded, beside linears of as many weights.

    .venv/bin/python -m benchmarks.engram [--rows 1000000] [--seed 0]

Both sides are FP8 as published, go through the code of a data-free run and end in a shard that is read back and
compared; the second are experts' shapes in blocks of 32 x 32. Processor time is compared, which other processes on the
machine change little. The error is of values drawn with the spread of a trained table; no real one was at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import v41_layout
from benchmarks.make_v41 import draw
from cuda_ops import ops
from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.checkpoint.formats import fp8
from deepseek_compress.checkpoint.ledger import OpenShard
from deepseek_compress.compress import row_tables

TABLE, COLUMNS = "layers.1.engram.embed.weight", 256
LINEAR = (2304, 5120)  # of an expert


def source(folder: Path, rows: int, seed: int) -> Checkpoint:
    """A table, and FP8 linears of about as many weights."""
    count = max(1, rows * COLUMNS // (LINEAR[0] * LINEAR[1]))
    shapes = {TABLE: (rows, COLUMNS)}
    shapes |= {f"layers.{n}.ffn.shared_experts.w1.weight": LINEAR for n in range(count)}
    stored = {key: how for name, shape in shapes.items() for key, how in v41_layout.parts(name, shape, [32, 32])}
    file = folder / "model.safetensors"
    v41_layout.write_header(file, stored)
    draw(file, np.random.default_rng(seed))
    config = {"model_type": "deepseek_v41", "quantization_config": {"weight_block_size": [32, 32]}}
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def linears(given: Checkpoint, shard: OpenShard) -> int:
    """Pack every linear, as `compress.packing` does; returns their weights."""
    names = [name for name in given.header.tensors if name != TABLE]
    for name in names:
        raw = given.read_raw(name)
        weight = raw.pop("weight")
        scale = fp8.finite_scale(next(iter(raw.values())), name)
        block = fp8.block_of(name, given.config)
        new = ops.pack_weights(weight, scale, group_size=32, symmetric=False, block=block, name=name)
        assert new.zero_point is not None
        parts = {"weight_packed": new.packed, "weight_scale": new.scale, "weight_zero_point": new.zero_point}
        shard.add(name, {**parts, "weight_shape": torch.tensor(LINEAR)})
    return sum(given.header.tensors[name].elements for name in names)


def measured(path: Path, write: Callable[[OpenShard], int]) -> tuple[float, float]:
    """Weights a second of processor time and of the clock, the shard finished and read back."""
    before, clock = _processor(), time.perf_counter()
    with ThreadPoolExecutor(max_workers=1) as thread:
        shard = OpenShard(path, thread)
        count = write(shard)
        shard.close()
    return count / (_processor() - before), count / (time.perf_counter() - clock)


def _processor() -> float:
    return sum(os.times()[:2])


def run(rows: int, seed: int) -> dict[str, Any]:
    """Both rates, and what the table loses and saves."""
    how = row_tables.Engram().rounding()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        given = source(work, rows, seed)
        ops.pack_weights(given.read_slice(TABLE, "weight", 0, 64).float(), None, group_size=32, block=(1, 1))  # loaded

        def table(shard: OpenShard) -> int:
            row_tables.write(shard, given, TABLE, how, work)
            return given.header.tensors[TABLE].elements

        rates: dict[str, list[tuple[float, float]]] = {"linears": [], "table": []}
        for turn in range(3):  # in turns, so that what else the machine does meets both
            rates["linears"].append(measured(work / f"linears-{turn}", lambda shard: linears(given, shard)))
            rates["table"].append(measured(work / f"table-{turn}", table))
        facts = row_tables.facts(given, TABLE, how)
    best = {name: max(found) for name, found in rates.items()}
    return {
        "rows": rows, "seed": seed, "load": os.getloadavg()[0], "table_per_cpu_second": best["table"][0],
        "linears_per_cpu_second": best["linears"][0], "ratio": best["table"][0] / best["linears"][0],
        "relative_squared_error": facts["weight_error"], "bytes_before": facts["bytes_before"],
        "bytes_after": facts["bytes_after"],
    }  # fmt: skip


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Engram tables in four bits")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = run(options.rows, options.seed)
    for key, value in found.items():
        print(f"{key:26} {value:,.4g}" if isinstance(value, float) else f"{key:26} {value:,}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()

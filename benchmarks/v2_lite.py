"""A checkpoint larger than the machine's memory, made 4-bit end to end: DeepSeek-V2-Lite's shape, 15.7 G parameters.

    python -m benchmarks.v2_lite [--layers N] [--scratch DIR] [--dsc "--workers 2"]

The random 31.4 GB BF16 checkpoint is written and dropped from the page cache, the disk's own rates are measured beside
it (one thread, 16 MiB at a time: `pwrite` and `fsync`, then `pread` of what was dropped from the cache), then
`dsc quantize -r w4a16-fast` runs: it reads the source once, and writes, syncs and reads back its output. The floor is
the sum of these three at the disk's rates. Bar: at most 3 GB peak resident, summed over all processes (PSS, imports
included). A sample of the output is decoded by compressed-tensors and compared with the source. The input is deleted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT, measure, present
from benchmarks.make_checkpoint import make
from benchmarks.packed_values import decoded_errors

DSC = str(ROOT / ".venv" / "bin" / "dsc")
MEMORY_BAR = 3e9
BLOCK = 1 << 24
PROBE = 2 << 30  # bytes of the file that the disk is measured with
COLUMNS = ("what", "seconds", "GB", "GB/s")


def drop(*files: Path) -> None:
    """Take files out of the page cache."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def disk_rates(path: Path, size: int) -> tuple[float, float]:
    """Bytes a second written with one fsync at the end, and read again from the disk."""
    block = os.urandom(BLOCK)
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    began = time.perf_counter()
    for offset in range(0, size, BLOCK):
        os.pwrite(fd, block, offset)
    os.fsync(fd)
    written = time.perf_counter() - began
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    for offset in range(0, size, BLOCK):
        os.pread(fd, BLOCK, offset)
    read = time.perf_counter() - began
    os.close(fd)
    path.unlink()
    return size / written, size / read


def size_of(path: Path) -> int:
    """Bytes of all files below a directory."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def check_room(scratch: Path, layers: int) -> None:
    """Stop before the first byte where source, output and probe do not fit."""
    free, needed = shutil.disk_usage(scratch).free, layers / 27 * 40.5e9 + 1e9 + PROBE
    if free < needed:
        raise SystemExit(f"{scratch}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed; give --scratch")


def line(what: str, seconds: float, size: float) -> list[Any]:
    """A line of the table."""
    return [what, round(seconds, 1), round(size / 1e9, 2), round(size / seconds / 1e9, 3)]


def main() -> None:
    """Write, measure the disk, compress, compare, delete, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--dsc", default="", help="more options for dsc, for instance '--workers 2'")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        check_room(scratch, options.layers)
        source, out = scratch / "model", scratch / "out"
        began = time.perf_counter()
        made = make(source, "bf16", options.layers)
        making = time.perf_counter() - began
        before = disk_rates(scratch / "probe", PROBE)
        drop(*source.glob("*.safetensors"))
        load = os.getloadavg()[0]
        command = [DSC, "quantize", str(source), "-o", str(out), "-r", "w4a16-fast", *options.dsc.split()]
        cost = measure(command)
        if cost.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{cost.output[-3000:]}")
        after = disk_rates(scratch / "probe", PROBE)
        error = decoded_errors(source, out)
        read, written = size_of(source), size_of(out)
    write_rate, read_rate = (sum(pair) / 2 for pair in zip(before, after, strict=True))
    floor = (read + written) / read_rate + written / write_rate
    rows = [
        line("disk: write + fsync, before", PROBE / before[0], PROBE),
        line("disk: read, before", PROBE / before[1], PROBE),
        line("disk: write + fsync, after", PROBE / after[0], PROBE),
        line("disk: read, after", PROBE / after[1], PROBE),
        line("floor: read source, write output, read it back", floor, read + 2 * written),
        line("dsc quantize -r w4a16-fast, whole command", cost.wall_s, read + 2 * written),
        line("writing the random checkpoint", making, read),
    ]
    facts = {
        "passed": cost.peak_bytes <= MEMORY_BAR,
        "parameters": made["parameters"],
        "parameters_per_cpu_s": round(made["parameters"] / cost.cpu_s),
        "peak_gb": round(cost.peak_bytes / 1e9, 3),
        "bar_gb": MEMORY_BAR / 1e9,
        "cpu_s": round(cost.cpu_s, 1),
        "times_floor": round(cost.wall_s / floor, 2),
        "relative_error": round(error, 4),
        "source_bytes": read,
        "output_bytes": written,
        "load_before": round(load, 2),
    }
    present("v2_lite", COLUMNS, rows, facts)


if __name__ == "__main__":
    main()

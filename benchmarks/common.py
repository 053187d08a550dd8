"""What every benchmark shares: the machine, a measured child process, a table for people and one JSON line."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_compress.machine import resident

ROOT = Path(__file__).resolve().parent.parent
REPORTS = ROOT / "reports"
DATA = ROOT.parent / "shared" / "data"  # text to measure with; a benchmark that needs it says so when it is absent


LONGEST = 240  # characters of a line of facts


class Cost(NamedTuple):
    """What a finished child process used: seconds and bytes."""

    wall_s: float
    cpu_s: float
    peak_bytes: int  # largest sum of PSS over the process and its children
    returncode: int
    output: str


def machine() -> dict[str, Any]:
    """The host in words and numbers; nothing that identifies it."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = next((line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")), "")
    flags = next((line.split(":")[1].split() for line in cpuinfo.splitlines() if line.startswith("flags")), [])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "simd": [flag for flag in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if flag in flags],
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }


def measure(command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Cost:
    """Run `command` to its end with one OpenMP thread unless `env` says otherwise; CPU seconds include its children.

    Processes that outlive it, as a fork server does for a moment, are adopted, waited for and counted too.
    """
    _adopt_orphans()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    process = subprocess.Popen(
        list(command), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings, cwd=cwd
    )
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    output, _ = process.communicate()
    wall = time.perf_counter() - start
    watcher.join()
    _reap()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(wall, cpu, peak[0], process.returncode, output)


def _adopt_orphans() -> None:
    """What a child leaves running becomes a child of this process (prctl(2), PR_SET_CHILD_SUBREAPER)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def _reap(seconds: float = 10.0) -> None:
    """Wait for adopted processes; their time counts once they ended."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.02)
    except ChildProcessError:
        return


def _watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    while process.poll() is None:
        began = time.perf_counter()
        peak[0] = max(peak[0], resident(process.pid) or 0)
        time.sleep(max(0.1, 30 * (time.perf_counter() - began)))  # summing the pages of large processes takes a core


def present(name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], facts: Mapping[str, Any]) -> None:
    """Print a table, write `reports/NAME.json` and `.md`, and print the record as the last line."""
    record = {"benchmark": name, **facts, "columns": list(columns), "rows": [list(row) for row in rows]}
    record["machine"] = machine()
    print(table(columns, rows))
    REPORTS.mkdir(exist_ok=True)
    (REPORTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (REPORTS / f"{name}.md").write_text(markdown(record))
    print(json.dumps(record))
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Lay out a Markdown table."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(columns), *cells]) for i in range(len(columns))]
    head, *lines = (
        "| " + " | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + " |"
        for row in [list(columns), *cells]
    )
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([head, rule, *lines])


def markdown(record: Mapping[str, Any]) -> str:
    """Write a record for people: its table, then everything else as a list."""
    facts = {key: value for key, value in record.items() if key not in ("benchmark", "columns", "rows")}
    machine = facts.pop("machine")
    listed = "\n".join(described({**facts, "machine": machine}))
    return f"# {record['benchmark']}\n\n{table(record['columns'], record['rows'])}\n\n{listed}\n"


def described(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield the lines of a Markdown list, nested where the parts of a value have parts, or are long."""
    for key, value in facts.items():
        text = f"{indent}- {_name(key)}: {_words(value)}"
        parts = value.values() if isinstance(value, Mapping) else ()
        if parts and (len(text) > LONGEST or any(isinstance(part, Mapping) for part in parts)):
            yield f"{indent}- {_name(key)}:"
            yield from described(value, indent + "    ")
        else:
            yield text


def _name(key: object) -> str:
    return str(key).replace("_", " ")


def _words(value: Any) -> str:
    """Format a value as text."""
    if isinstance(value, Mapping):
        return "; ".join(f"{_name(key)} {_words(its)}" for key, its in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_words, value)) or "none"
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else _words(value)


if __name__ == "__main__":  # python -m benchmarks.common NAME ...: those tables anew, from their records
    for given in sys.argv[1:]:
        (REPORTS / f"{given}.md").write_text(markdown(json.loads((REPORTS / f"{given}.json").read_text())))

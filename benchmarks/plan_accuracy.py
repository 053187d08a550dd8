"""Does `dsc plan --measure` foresee what a compression takes? Time, peak memory and disk, planned and measured.

    python -m benchmarks.plan_accuracy [--layers N] [--smollm2 DIR] [--scratch DIR] [--only NAME ...]

The machine is measured once (`--measure`), then every case is planned with those rates and run; the bar is 30 % either
way. Cases: data-free on a random checkpoint of DeepSeek-V2-Lite's shape, BF16 and FP8 (3 layers, 1.67 G parameters);
calibrated GPTQ of the built-in model, and of SmolLM2-135M with 16 x 512 tokens where `--smollm2` names a directory that
holds it. Measured time is that of the whole command, memory the largest sum of PSS over its processes, disk the output.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import ROOT, measure, present
from benchmarks.make_checkpoint import make

DSC = str(ROOT / ".venv" / "bin" / "dsc")
BAR = 0.30
COLUMNS = ("case", "what", "planned", "measured", "off by", "within 30 %")


class Case(NamedTuple):
    """A model and the options that plan and run share."""

    name: str
    model: str
    options: list[str]


def dsc(*arguments: str) -> Any:
    """The answer of a command in JSON; stops the benchmark where it fails."""
    cost = measure([DSC, *arguments, "--json"])
    if cost.returncode:
        raise SystemExit(f"dsc {' '.join(arguments)} failed:\n{cost.output}")
    return json.loads(cost.output[cost.output.index("{") :])


def compare(case: Case, out: Path) -> list[list[Any]]:
    """Three lines of the table: time, memory, disk."""
    planned = dsc("plan", case.model, *case.options)
    (stage,) = planned["stages"]
    cost = measure([DSC, "quantize", case.model, "-o", str(out), *case.options])
    if cost.returncode:
        raise SystemExit(f"dsc quantize {case.model} failed:\n{cost.output}")
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    shutil.rmtree(out)
    pairs = (
        ("seconds", stage["seconds"], cost.wall_s),
        ("peak bytes", stage["memory"], cost.peak_bytes),
        ("disk bytes", stage["bytes"], written),
    )
    lines = [[case.name, what, expected, found, *_verdict(expected, found)] for what, expected, found in pairs]
    for line in lines:
        print("  ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in line), flush=True)
    return lines


def _verdict(expected: float | None, found: float) -> tuple[str | None, str]:
    if expected is None:
        return None, "unknown"
    off = expected / found - 1
    return f"{off:+.0%}", "yes" if abs(off) <= BAR else "NO"


def cases(options: argparse.Namespace, scratch: Path) -> dict[str, Case]:
    """By name; the random checkpoints are made when their case begins."""
    fast, calibrated = ["-r", "w4a16-fast"], ["-r", "w4a16"]
    found = [Case(f"data-free {form}", str(scratch / form), fast) for form in ("bf16", "fp8")]
    found.append(Case("calibrated nano", "builtin:nano", calibrated))
    if options.smollm2 is not None:
        few = [*calibrated, "--samples", "16", "--length", "512"]
        found.append(Case("calibrated SmolLM2", str(options.smollm2), few))
    return {case.name: case for case in found if not options.only or case.name in options.only}


def main() -> None:
    """Measure the machine, plan and run each case; table and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--smollm2", type=Path, default=os.environ.get("SMOLLM2"))
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--only", nargs="*", default=[])
    options = parser.parse_args()
    if options.smollm2 is None:
        print("no --smollm2: that case is left out")
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        free, needed = shutil.disk_usage(scratch).free, options.layers * 2.5e9
        if free < needed:
            raise SystemExit(f"{scratch}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed; give --scratch")
        dsc("plan", "builtin:nano", "-r", "w4a16", "--measure")
        rows = []
        for case in cases(options, scratch).values():
            form = case.name.removeprefix("data-free ")
            if form != case.name:
                make(scratch / form, form, options.layers)
            rows += compare(case, scratch / "out")
            shutil.rmtree(scratch / form, ignore_errors=True)
        passed = all(row[-1] == "yes" for row in rows)
        facts = {"passed": passed, "layers": options.layers, "load": round(os.getloadavg()[0], 2)}
        present("plan_accuracy", COLUMNS, rows, facts)


if __name__ == "__main__":
    main()

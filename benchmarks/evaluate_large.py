"""A report on models larger than the machine's memory: V2-Lite's shape (15.7 G parameters) against its 4-bit output.

    python -m benchmarks.evaluate_large [--layers N] [--scratch DIR] [--kills N]

The random BF16 checkpoint is written, made 4-bit without data, and both are taken out of the page cache; then `dsc
evaluate OUT --reference MODEL --text FILE --windows 4 --length 512` streams both models block by block.
With random weights the figures prove the plumbing, not quality. Bars: 4 GB peak resident over all processes (PSS,
imports included), 10 minutes. The floor is the larger of reading both once and of two products a weight that a token
uses, at this machine's rates. `--kills`: the same again, killed so many times on the way; the report must be the same.
Everything is deleted afterwards.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import measure, present
from benchmarks.make_checkpoint import make
from benchmarks.v2_lite import DSC, PROBE, check_room, disk_rates, drop, size_of
from deepseek_compress.tasks import mixture

MEMORY_BAR, TIME_BAR = 4e9, 600.0
WINDOWS, LENGTH = 4, 512
ACTIVE = 2.66e9  # weights of V2-Lite that a token meets, head included
COLUMNS = ("what", "value")


def floating_rate() -> float:
    """Operations a second of a float32 product with all threads, the best of five."""
    import torch

    a, b = torch.ones(2048, 2048), torch.ones(2048, 2048)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - began)
    return 2 * 2048**3 / best


def metrics(report: Path) -> dict[str, Any]:
    """What a report says of the compressed model."""
    row = json.loads(report.read_text())["models"][-1]
    chosen = ("perplexity", "kl_divergence", "top1_agreement")
    return {**{name: row["metrics"][name] for name in chosen}, "error_by_layer": row["error_by_layer"]}


def killed(command: list[str], threads: dict[str, str], seconds: float, kills: int) -> None:
    """Run the command, killed `kills` times at random shares of the time that it takes."""
    draw, env = random.Random(0), os.environ | threads
    for number in range(kills):
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True, env=env
        )
        time.sleep(seconds * (0.15 + 0.5 * draw.random() + 0.2 * number) / kills)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)


def main() -> None:
    """Write, compress, evaluate, kill, compare, delete, report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=27)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        check_room(scratch, options.layers)
        source, out, text = scratch / "model", scratch / "out", scratch / "text.txt"
        made = make(source, "bf16", options.layers)
        subprocess.run([DSC, "quantize", str(source), "-o", str(out), "-r", "w4a16-fast"], check=True)
        text.write_text("\n".join(f"{p.prompt} {p.solution}" for p in mixture(9, 400, "test")))
        _, read_rate = disk_rates(scratch / "probe", PROBE)
        drop(*source.glob("*.safetensors"), *out.glob("*.safetensors"))
        load, rate = os.getloadavg()[0], floating_rate()
        command = [DSC, "evaluate", str(out), "--reference", str(source), "--text", str(text)]
        command += ["--windows", str(WINDOWS), "--length", str(LENGTH), "--memory", "4GB"]
        threads = {"OMP_NUM_THREADS": str(os.cpu_count())}  # of every run: sums depend on their number
        cost = measure([*command, "-o", str(scratch / "report.json")], threads)
        if cost.returncode:
            raise SystemExit(f"{' '.join(command)} failed:\n{cost.output[-3000:]}")
        found = metrics(scratch / "report.json")
        same = None
        if options.kills:
            killed([*command, "-o", str(scratch / "again.json")], threads, cost.wall_s, options.kills)
            same = metrics(scratch / "again.json") == found
        size = size_of(source) + size_of(out)
    shutil.rmtree(scratch, ignore_errors=True)
    work = 2 * 2 * ACTIVE * options.layers / 27 * WINDOWS * LENGTH
    floor = max(size / read_rate, work / rate)
    rows = [
        ["parameters", made["parameters"]],
        ["read, GB", round(size / 1e9, 1)],
        ["wall, s", round(cost.wall_s, 1)],
        ["CPU, s", round(cost.cpu_s, 1)],
        ["peak resident, GB", round(cost.peak_bytes / 1e9, 2)],
        ["floor, s (disk / arithmetic)", f"{size / read_rate:.0f} / {work / rate:.0f}"],
        ["KL, nats a token", found["kl_divergence"]],
        ["top-1 agreement", found["top1_agreement"]],
        ["error after the last block", (found["error_by_layer"] or [None])[-1]],
        [f"killed {options.kills} times: the same figures", same],
    ]
    passed = cost.peak_bytes <= MEMORY_BAR and cost.wall_s <= TIME_BAR and same is not False
    facts = {"passed": passed, "layers": options.layers, "times_floor": round(cost.wall_s / floor, 2),
             "load_before": round(load, 2), **found}  # fmt: skip
    present("evaluate_large", COLUMNS, rows, facts)


if __name__ == "__main__":
    main()

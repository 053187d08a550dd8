"""A full-size DeepSeek-V3 mixture-of-experts block, FP8, through calibrated GPTQ on this machine.

    python -m benchmarks.v3_block [--samples 128] [--length 512] [--experts 256] [--workers N] [--scratch DIR]

The block (`make_v3_block`: 11.5 GB, 256 experts, some of them starved) is written, then
`dsc quantize -r w4a16 --group-size 128 --memory 11GiB` runs with 128 x 512 tokens: attention, every expert with the
Hessian of its own tokens, the shared expert. One thing is switched: as the only block it is also the last one, whose
output nobody needs; here it is computed and written all the same, as that of the 60 blocks before the last is. Phases
are timed where the block loop calls them. The floor of a phase is its multiplications and additions (symmetric products
at half, each linear run once) at the rate of this machine's SGEMM, measured before with one thread a worker at once.

Bars: 60 minutes, 12 GB at the peak (PSS over all processes, imports included), facts about each expert, at least
eight experts below 64 tokens and two with none. Data-free (`w4a16-fast`) runs on the same block. All is deleted after.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.common import Cost, measure, present

MINUTES, MEMORY_BAR, STARVED = 60, 12e9, 64
LAYERS, PARAMETERS = 61, 671e9  # of DeepSeek-V3 and R1, MTP block not counted
PHASES = {
    "_attention": "attention", "run_experts": "routed experts", "run_here": "routed experts", "_dense": "shared expert",
    "_route": "routing",
}  # fmt: skip
COLUMNS = ("what", "seconds", "TFLOP", "floor s", "times floor")


def inside(times: Path, arguments: list[str]) -> None:
    """`dsc` in this process: each phase noted in `times`, and the output of the last block computed too."""
    from deepseek_compress import cli
    from deepseek_compress.compress import convert
    from deepseek_compress.streaming import forward
    from deepseek_compress.streaming.hidden_store import HiddenStore

    noted: dict[str, float] = {}

    def timed(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(run)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                noted[name] = noted.get(name, 0.0) + time.perf_counter() - began
                times.write_text(json.dumps(noted))

        return wrapper

    for name, phase in PHASES.items():
        setattr(forward, name, timed(phase, getattr(forward, name)))
    block, signature = convert.run_block, inspect.signature(convert.run_block)

    def with_output(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        job, hidden = bound.arguments["run"], bound.arguments["hidden"]
        assert bound.arguments["following"] is None, "one block: nobody asks for its output"
        device = job.architecture.device
        with HiddenStore(job.work / "following.tmp", hidden.rows, hidden.row_shape, device=device) as output:
            bound.arguments["following"] = output
            facts = block(*bound.args, **bound.kwargs)
            output.rename(job.work / "output.f32")
            output.remove()
        return facts

    convert.run_block = timed("block", with_output)
    sys.argv = ["dsc", *arguments]
    cli.main()


def operations(config: dict[str, Any], tokens: int, routed: list[int]) -> dict[str, float]:
    """Multiplications and additions of each phase; `routed`: tokens of each expert."""
    hidden, heads, rank, latent = 7168, 128, 1536, 512
    width = config["moe_intermediate_size"]
    key, rope, value = 128, 64, 128

    def solved(columns: int, rows: int, seen: int) -> float:
        return seen * columns**2 + columns**3 / 3 + rows * columns**2 + 2 * seen * rows * columns

    scores = tokens * 256 * heads * 2 * (key + rope + value)  # causal: half of 512 keys a token
    attention = solved(hidden, rank + latent + rope, tokens) + solved(rank, heads * (key + rope), tokens) + scores
    attention += solved(latent, heads * (key + value), tokens) + solved(heads * value, hidden, tokens)

    def expert(seen: int) -> float:
        enough = seen >= STARVED  # below, round to nearest and no Hessian
        whole = solved(hidden, 2 * width, seen) + solved(width, hidden, seen)
        return whole if enough else 6.0 * seen * hidden * width

    return {"attention": attention, "routed experts": sum(map(expert, routed)), "shared expert": expert(tokens)}


def rate(_: int) -> float:
    """Operations a second of a float32 product (4096, 4096, 1024), one thread, the best of five."""
    import torch

    torch.set_num_threads(1)
    a, b = torch.ones(4096, 1024), torch.ones(1024, 4096)
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - began)
    return 2 * 4096 * 4096 * 1024 / best


def check_room(scratch: Path, experts: int, tokens: int) -> None:
    """Stop before the first byte where input, outputs and spools do not fit."""
    spools = tokens * 4 * (2 * 7168 + 16384) + 16 * (8 * tokens / experts) * 4 * (7168 + 2048)
    needed = 1.1 * (experts * 44.1e6 * 1.55 + 1.5e9 + spools)
    free = shutil.disk_usage(scratch).free
    if free < needed:
        raise SystemExit(f"{scratch}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed; give --scratch")


def run(command: list[str]) -> Cost:
    """Measured; the program ends where the command fails."""
    print(" ".join(command), file=sys.stderr, flush=True)
    cost = measure(command, {"OMP_NUM_THREADS": str(os.cpu_count() or 1)})  # workers have one each, whatever this says
    if cost.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{cost.output[-3000:]}")
    return cost


def coverage(out: Path, experts: int) -> dict[str, Any]:
    """What the layers' table says of the experts; `complete`: each has facts that agree with its tokens."""
    block = json.loads((out / "dsc_layers.json").read_text())["blocks"][0]
    tokens = block["experts"]["tokens"]
    methods: dict[str, set[str]] = {}
    complete = len(tokens) == experts
    for expert, count in enumerate(tokens):
        linears = [linear for linear in block["linears"] if f".experts.{expert}." in linear["name"]]
        complete &= len(linears) == 3
        for linear in linears:
            methods.setdefault(linear["method"], set()).add(linear["name"])
            complete &= linear["tokens"] == count and linear["fallback"] == (count < STARVED)
            complete &= (linear["output_error"] is None) == (count < STARVED)
    errors = [linear["output_error"] for linear in block["linears"] if linear["output_error"] is not None]
    return {
        "complete": complete,
        "tokens": tokens,
        "expert_tokens": {"fewest": min(tokens), "median": sorted(tokens)[len(tokens) // 2], "most": max(tokens)},
        "starved": sum(count < STARVED for count in tokens),
        "reached_by_none": tokens.count(0),
        "linears_by_method": {method: len(names) for method, names in methods.items()},
        "mean_output_error": sum(errors) / len(errors),
    }


def table(
    calibrated: Cost, free: Cost, times: dict[str, float], flop: dict[str, float], at_once: float
) -> list[list[Any]]:
    """A line a phase, then the whole commands; `at_once`: operations a second of all cores."""

    def line(name: str, seconds: float, work: float | None) -> list[Any]:
        if work is None:
            return [name, round(seconds, 1), None, None, None]
        floor = work / at_once
        return [name, round(seconds, 1), round(work / 1e12, 1), round(floor, 1), round(seconds / floor, 2)]

    rows = [line(name, seconds, flop.get(name)) for name, seconds in times.items()]
    rows.append(line("calibrated, whole command", calibrated.wall_s, sum(flop.values())))
    rows.append(line("data-free, whole command", free.wall_s, None))
    return rows


def benchmark(options: argparse.Namespace, scratch: Path) -> tuple[list[list[Any]], dict[str, Any]]:
    """Write, compress twice, read the facts."""
    from benchmarks.make_v3_block import V3, make

    tokens = options.samples * options.length
    check_room(scratch, options.experts, tokens)
    source, out, times = scratch / "block", scratch / "out", scratch / "times.json"
    load = os.getloadavg()[0]
    with ProcessPoolExecutor(options.workers) as pool:
        rates = list(pool.map(rate, range(options.workers)))
    began = time.perf_counter()
    made = make(source, options.experts)
    making = time.perf_counter() - began
    common = ["--group-size", "128", "--workers", str(options.workers), "--memory", options.memory]
    command = ["quantize", str(source), "-o", str(out), "-r", "w4a16", "--calibration", str(source / "text.txt")]
    command += ["--samples", str(options.samples), "--length", str(options.length), *common]
    calibrated = run([sys.executable, "-m", "benchmarks.v3_block", "--inside", str(times), *command])
    seen = coverage(out, options.experts)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out)
    command = ["quantize", str(source), "-o", str(out), "-r", "w4a16-fast", *common]
    free = run([sys.executable, "-m", "deepseek_compress", *command])
    routed = seen.pop("tokens")
    rows = table(calibrated, free, json.loads(times.read_text()), operations(V3, tokens, routed), sum(rates))
    whole = options.experts == 256
    enough = not whole or (seen["starved"] >= 8 and seen["reached_by_none"] >= 2)
    blocks = PARAMETERS / made["linear_parameters"]
    facts = {
        "passed": bool(
            calibrated.wall_s <= MINUTES * 60 and calibrated.peak_bytes <= MEMORY_BAR and seen["complete"] and enough
        ),
        "bars": {"minutes": MINUTES, "peak_gb": MEMORY_BAR / 1e9},
        "calibration": [options.samples, options.length],
        "parameters": made["parameters"],
        "calibrated": cost(calibrated),
        "data_free": cost(free),
        "experts": seen,
        "input_bytes": made["bytes"],
        "output_bytes": size,
        "extrapolated_hours": {
            f"{LAYERS} such blocks": hours(calibrated.wall_s * LAYERS),
            "671 B parameters": hours(calibrated.wall_s * blocks),
            "671 B parameters, data-free": hours(free.wall_s * blocks),
        },
        "sgemm_gflop_per_s": [round(one / 1e9, 1) for one in rates],
        "writing_the_block_s": round(making, 1),
        "workers": options.workers,
        "load_before": round(load, 2),
    }
    return rows, facts


def cost(found: Cost) -> dict[str, float]:
    """For the record."""
    return {
        "wall_s": round(found.wall_s, 1), "cpu_s": round(found.cpu_s, 1), "peak_gb": round(found.peak_bytes / 1e9, 2)
    }  # fmt: skip


def hours(seconds: float) -> float:
    """Rounded to a tenth."""
    return round(seconds / 3600, 1)


def main() -> None:
    """Parse and run; the report is only written for the full block."""
    if sys.argv[1:2] == ["--inside"]:
        inside(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", default="11GiB")
    parser.add_argument("--scratch", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        rows, facts = benchmark(options, Path(name))
    if options.experts == 256 and options.samples * options.length >= 1 << 16:
        present("v3_block", COLUMNS, rows, facts)
    else:
        print(*rows, json.dumps(facts, indent=1), sep="\n")


if __name__ == "__main__":
    main()

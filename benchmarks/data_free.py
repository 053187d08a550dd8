"""Data-free 4-bit of one checkpoint: dsc against llm-compressor's model_free_ptq, auto-round's model-free mode, and cp.

    python -m benchmarks.data_free [--layers N] [--forms bf16 fp8] [--repeats N] [--scratch DIR] [--without RIVAL ...]

A random checkpoint of DeepSeek-V2-Lite's shape (5 layers: 2.84 G parameters, 2.40 G of them made 4-bit asymmetric,
group 128) is written, read once so that the page cache has it, and given to each side's own entry point. Checked first:
compressed-tensors' own code decodes what each side wrote, and the error against the source is the same. Speed is
parameters made 4-bit per CPU second, imports taken out on both sides (those of one process; where ours starts workers,
theirs count); ours hashes and reads back what it wrote. Bars: 15 times each rival, and, less imports, at most 2.5
times the wall time of `cp -r` of the source. `cp + sync` is shown too: what cp leaves in memory we have put on the disk
when we end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import ROOT, Cost, measure, present
from benchmarks.make_checkpoint import make
from benchmarks.packed_values import decoded_errors
from benchmarks.peers import PeerError, peer, pins

PYTHON = str(ROOT / ".venv" / "bin" / "python")
DSC = str(ROOT / ".venv" / "bin" / "dsc")
KEPT = ("lm_head", "model.embed_tokens", "model.layers.0.mlp.down_proj")  # the last: 10,944 columns, not 128 x whole
SPEED_BAR, COPY_BAR = 15.0, 2.5
COLUMNS = (
    "source", "side", "wall s", "CPU s", "imports: wall s", "imports: CPU s", "M parameters / CPU s",
    "dsc is faster by", "wall / cp", "wall less imports / cp", "peak GB", "relative error", "note",
)  # fmt: skip

LLMCOMPRESSOR = """
import sys
from llmcompressor import model_free_ptq
from compressed_tensors.entrypoints.convert import FP8BlockDequantizer
source, out, form, kept = sys.argv[1:]
if source:
    linears, ignore = ["re:.*self_attn.*proj.*", "re:.*mlp.*_proj$"], [*kept.split(","), "re:.*mlp.gate$"]
    converter = FP8BlockDequantizer(ignore, linears) if form == "fp8" else None
    model_free_ptq(source, out, scheme="W4A16_ASYM", ignore=ignore, max_workers=1, device="cpu", converter=converter)
"""
AUTOROUND = """
import sys
from auto_round import AutoRound
from auto_round.compressors import model_free
source, out, form, kept = sys.argv[1:]
if source:
    ignore = ",".join([*kept.split(","), "mlp.gate."])
    plain = {"model_free": True, "disable_opt_rtn": True, "device_map": "cpu"}
    rounder = AutoRound(source, scheme="W4A16", sym=False, ignore_layers=ignore, **plain)
    rounder.quantize_and_save(out, format="auto_round")
"""
# llm-compressor as it comes uses every core and more CPU time for it; one thread is its best rate. auto-round: one.
THREADS = {"llmcompressor": sorted({1, os.cpu_count() or 1}), "autoround": [1]}
RIVALS = {"llmcompressor": LLMCOMPRESSOR, "autoround": AUTOROUND}
OURS = "import torch, deepseek_compress.pipeline, deepseek_compress.cli.work, cuda_ops"


class Line(NamedTuple):
    """One side on one source."""

    side: str
    cost: Cost
    imports: Cost | None
    error: float | None
    note: str


def run(command: Sequence[str], env: Mapping[str, str] | None = None) -> Cost:
    """A measured command that must succeed."""
    cost = measure(command, env)
    if cost.returncode:
        raise SystemExit(f"{' '.join(command)[:300]} failed:\n{cost.output[-3000:]}")
    return cost


def middle(costs: Sequence[Cost]) -> Cost:
    """The run with the median wall time."""
    return sorted(costs, key=lambda cost: cost.wall_s)[len(costs) // 2]


def settle(*paths: Path) -> None:
    """Remove outputs, let the disk finish what it was given."""
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
    os.sync()


def copies(source: Path, out: Path, repeats: int) -> tuple[Line, Line]:
    """`cp -r` of the same bytes, and the same with a sync of the copies."""
    plain, synced = [], []
    for _ in range(repeats):
        plain.append(run(["cp", "-r", str(source), str(out)]))
        settle(out)
        synced.append(run(["sh", "-c", 'cp -r "$0" "$1" && sync "$1"/*', str(source), str(out)]))
        settle(out)
    return Line("cp -r", middle(plain), None, None, ""), Line("cp -r, sync", middle(synced), None, None, "")


def ours(source: Path, out: Path, repeats: int, workers: Sequence[str]) -> Line:
    """`dsc quantize -r w4a16-fast`."""
    imports = middle([run([PYTHON, "-c", OURS]) for _ in range(3)])
    costs, error = [], None
    for _ in range(repeats):
        costs.append(run([DSC, "quantize", str(source), "-o", str(out), "-r", "w4a16-fast", *workers]))
        if '"group_size": 128' not in (out / "config.json").read_text():
            raise SystemExit("dsc chose another group size than 128; give more --layers")
        error = error or decoded_errors(source, out)
        settle(out)
    spread = statistics.pstdev(cost.wall_s for cost in costs)
    return Line(
        "dsc", middle(costs), imports, error, f"{repeats} runs, wall +- {spread:.1f} s; hashed, read back, synced"
    )


def rival(name: str, source: Path, out: Path, form: str, threads: int) -> Line:
    """Its data-free mode; what it says where it refuses the source."""
    try:
        python = str(peer(name))
    except PeerError as error:
        return Line(name, Cost(0, 0, 0, 1, ""), None, None, f"could not be installed: {str(error).splitlines()[0]}")
    package = {"llmcompressor": "llmcompressor", "autoround": "auto-round"}[name]
    said = f"{package} {pins(name)[package]}"
    name = f"{name}, {threads} thread{'s' * (threads > 1)}"
    env = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    command = [python, "-c", RIVALS[package.replace("-", "")]]
    imports = middle([run([*command, "", "", "", ""], env) for _ in range(3)])
    cost = measure([*command, str(source), str(out), form, ",".join(KEPT)], env)
    error = None
    if cost.returncode:
        last = next((line for line in reversed(cost.output.splitlines()) if line.strip()), "")
        said += f": refuses it: {last[:200]}"
    else:
        error = decoded_errors(source, out)
        if form == "fp8" and package == "llmcompressor":
            said += "; layer 0's down_proj left in FP8: a ragged one that is decoded but kept, it does not save"
        said += f"; {sum(f.stat().st_size for f in out.rglob('*.safetensors')) / 1e9:.2f} GB"
    settle(out)
    return Line(name, cost, imports, error, said)


def speed(line: Line, parameters: int) -> float | None:
    """Parameters a CPU second, imports taken out."""
    if line.imports is None or line.cost.returncode:
        return None
    return parameters / max(1e-9, line.cost.cpu_s - line.imports.cpu_s)


def rows(form: str, lines: Sequence[Line], parameters: int) -> list[list[Any]]:
    """The table's lines; "faster by" is our speed over theirs."""
    copy, own = lines[0], next(line for line in lines if line.side == "dsc")
    found = []
    for line in lines:
        rate = speed(line, parameters)
        best = speed(own, parameters)
        ratio = best / rate if rate and best and line is not own else None
        copied, waited = copy.cost.wall_s, line.imports.wall_s if line.imports else 0.0
        whole = None if line.cost.returncode else line.cost.wall_s / copied
        net = None if line.cost.returncode else (line.cost.wall_s - waited) / copied
        found.append([
            form, line.side, line.cost.wall_s, line.cost.cpu_s, line.imports and line.imports.wall_s,
            line.imports and line.imports.cpu_s, rate and rate / 1e6, ratio, whole, net,
            line.cost.peak_bytes / 1e9, line.error, line.note,
        ])  # fmt: skip
    return found


def one_form(form: str, scratch: Path, options: argparse.Namespace) -> tuple[list[list[Any]], dict[str, Any]]:
    """Everything on one source, which is removed at the end."""
    source, out = scratch / form, scratch / "out"
    facts = make(source, form, options.layers)
    parameters = facts["linear_parameters"] - 2048 * 10944  # one down_proj stays 16-bit
    for file in source.glob("*.safetensors"):
        warm(file)
    lines = [*copies(source, out, options.repeats), ours(source, out, options.repeats, options.dsc.split())]
    for name in RIVALS:
        if name not in options.without:
            lines += [rival(name, source, out, form, threads) for threads in THREADS[name]]
    found = rows(form, lines, parameters)
    settle(source)
    return found, {**facts, "made_4_bit": parameters}


def warm(path: Path) -> None:
    """Read a file once, in pieces."""
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 24):
            pass


def main() -> None:
    """Both forms; table, record, and whether the bars are met."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--forms", nargs="+", default=["bf16", "fp8"], choices=("bf16", "fp8"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=None)
    parser.add_argument("--without", nargs="*", default=[], choices=tuple(RIVALS))
    parser.add_argument("--dsc", default="", help="more options for dsc, for instance '--workers 2'")
    options = parser.parse_args()
    table: list[list[Any]] = []
    facts: dict[str, Any] = {"layers": options.layers, "group_size": 128, "load": round(os.getloadavg()[0], 2)}
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        free, needed = shutil.disk_usage(scratch).free, (1 + 1.3 * options.layers) * 1e9 * 2
        if free < needed:
            raise SystemExit(f"{scratch}: {free / 1e9:.0f} GB free, {needed / 1e9:.0f} are needed; give --scratch")
        for form in options.forms:
            found, facts[form] = one_form(form, scratch, options)
            table += found
            for row in found:
                print(json.dumps(row), file=sys.stderr, flush=True)
    ratios = {f"{row[0]} {row[1]}": row[7] for row in table if row[7] is not None}
    to_copy = {str(row[0]): row[9] for row in table if row[1] == "dsc"}
    facts["bars"] = {
        f"{SPEED_BAR:g} times each rival": all(ratio >= SPEED_BAR for ratio in ratios.values()),
        f"at most {COPY_BAR:g} times cp": all(value <= COPY_BAR for value in to_copy.values()),
    }
    present("data_free", COLUMNS, table, facts)


if __name__ == "__main__":
    main()

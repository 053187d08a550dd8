"""DeepSeek-V4.1's true widths, 12 GB as published (FP8, FP4 experts, an Engram table), made 4-bit on this machine.

    .venv/bin/python -m benchmarks.v41_large [--layers 7] [--experts 32] [--engram-gb 2] [--scratch DIR]

`make_v41` writes the checkpoint. Data-free: `dsc quantize -r w4a16-fast` with `engram: {num_bits: 4}`. Calibrated, 32 x
512 tokens: GPTQ for attention and shared experts, experts kept as published but those of one block, which GPTQ solves
too; killed three times on the way (once the second, fourth and sixth block are at work), the same command again each
time. Then a sample of each output is decoded by code that is not ours, and what was to stay is compared byte for byte.
Values are random: errors prove the plumbing, not quality. Bars: 6 GB peak (PSS over all processes, imports included),
90 minutes of both. The floor of the data-free run is what it reads and writes at this disk's rates; of the calibrated
one also two operations a weight and token, at the rate of this machine's SGEMM. All is deleted after.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from benchmarks.common import _watch, present
from benchmarks.make_v41 import config, make
from benchmarks.packed_values import Stored, decoded_errors
from benchmarks.v2_lite import DSC, PROBE, disk_rates, drop, size_of
from benchmarks.v3_block import rate

MINUTES, MEMORY_BAR, KILLS = 90, 6e9, 3
SAMPLES, LENGTH = 32, 512
RECIPE = """
stages:
  - compress:
      weights: {{gptq: {{num_bits: 4, group_size: 128, symmetric: false}}}}
      requantize: true
      overrides:
        - {{modules: 're:layers\\.(?!{solved}\\.)\\d+\\.ffn\\.experts\\..*', keep: true}}
"""
KEPT = {".weight": ".weight_packed", ".scale": ".weight_scale"}  # names of FP4 in compressed-tensors
NAMES = re.compile(r"\.(weight|scale)$")
COLUMNS = ("run", "wall s", "CPU s", "peak GB", "read GB", "written GB", "floor s", "times floor", "error of a sample")


class Attempts:
    """A command, killed at chosen blocks and given again: seconds and the peak over all attempts."""

    def __init__(self) -> None:
        self.wall_s, self.cpu_s, self.peak, self.kills = 0.0, 0.0, [0], list[str]()

    def run(self, command: list[str], stops: list[int]) -> None:
        """Run, killed once the block of each of `stops` is at work, then to the end."""
        for stop in [*stops, None]:
            before, began = os.times(), time.perf_counter()
            self._once(command, stop)
            after = os.times()
            self.wall_s += time.perf_counter() - began
            self.cpu_s += sum(after[2:4]) - sum(before[2:4])

    def _once(self, command: list[str], stop: int | None) -> None:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                                   start_new_session=True)  # fmt: skip
        watcher = threading.Thread(target=_watch, args=(process, self.peak), daemon=True)
        watcher.start()
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            print(line, end="", file=sys.stderr, flush=True)
            found = re.search(r"block (\d+) ", line)
            if stop is not None and found and int(found[1]) >= stop:
                os.killpg(process.pid, signal.SIGKILL)
                self.kills.append(line.strip())
                break
        if process.wait() and stop is None:
            raise SystemExit(f"{' '.join(command)} failed:\n{''.join(lines)[-3000:]}")
        watcher.join()


def kept(source: Path, out: Path, solved: int | None) -> int:
    """Bytes that were to stay and did: every FP4 expert of the blocks but `solved`, drafts and images."""
    original, made, total = Stored(source), Stored(out), 0
    for name, file in original.files.items():
        expert = re.match(r"layers\.(\d+)\.ffn\.experts\.", name)
        if not (name.startswith(("mtp.", "vision.", "aligner.")) or (expert and int(expert[1]) != solved)):
            continue
        renamed = name if name in made.files else NAMES.sub(lambda found: KEPT[found[0]], name)
        with safe_open(file, "pt") as one, safe_open(made.files[renamed], "pt") as other:
            mine, theirs = one.get_tensor(name), other.get_tensor(renamed)
        same = torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
        if not same:
            raise SystemExit(f"{name}: was to stay as published, and differs")
        total += mine.nbytes
    return total


def work(given: dict[str, Any], tokens: int, solved: int) -> float:
    """Operations of the calibrated run: each weight that a token meets once, Hessians and solves of what is solved."""
    text = given["text_config"]
    hidden, width, layers = text["hidden_size"], text["moe_intermediate_size"], text["num_hidden_layers"]
    latent, heads = text["q_lora_rank"], text["num_attention_heads"] * text["head_dim"]
    groups, rank = text["o_groups"], text["o_lora_rank"]
    linears = [(hidden, latent), (latent, heads), (hidden, text["head_dim"]), (groups * rank, hidden), (hidden, width)]
    linears += [(hidden, width), (width, hidden)]
    dense = (
        sum(2 * tokens * k * n + tokens * k * k + k**3 / 3 + n * k * k for k, n in linears) + 2 * tokens * heads * rank
    )
    seen = tokens * text["num_experts_per_tok"]
    experts = 6 * seen * hidden * width
    each = sum(k**3 / 3 + n * k * k for k, n in ((hidden, 2 * width), (width, hidden))) * text["n_routed_experts"]
    return layers * (dense + experts) + each + seen * (hidden**2 + width**2) * (solved >= 0)


def benchmark(options: argparse.Namespace, scratch: Path) -> tuple[list[list[Any]], dict[str, Any]]:
    """Write, compress twice, read back."""
    source, text, recipe = scratch / "model", scratch / "text.txt", scratch / "kept.yaml"
    given = config(options.layers, options.experts, int(options.engram_gb * 1e9))
    load, began = os.getloadavg()[0], time.perf_counter()
    make(source, given)
    making = time.perf_counter() - began
    solved = options.layers // 2
    recipe.write_text(RECIPE.format(solved=solved))
    words = [f"word{number % 97} and {number} is {number * 7}." for number in range(40_000)]
    text.write_text("\n".join(" ".join(words[i : i + 40]) for i in range(0, len(words), 40)))
    written, read = disk_rates(scratch / "probe", PROBE)
    flops = rate(0) * (os.cpu_count() or 1)
    memory = ["--memory", "6GB"]
    commands = {
        "data-free, table too": (["-r", "w4a16-fast", "--group-size", "128", "--set",
                                  "stages.0.compress.engram={num_bits: 4, group_size: 32}"], None),
        "calibrated, killed": (["-r", str(recipe), "--calibration", str(text), "--samples", str(SAMPLES),
                                "--length", str(LENGTH)], solved),
    }  # fmt: skip
    rows, facts = [], {}
    for name, (knobs, which) in commands.items():
        out, attempts = scratch / "out", Attempts()
        drop(*source.glob("*.safetensors"))
        attempts.run([DSC, "quantize", str(source), "-o", str(out), *knobs, *memory], [2, 4, 6] if which else [])
        sizes = size_of(source), size_of(out)
        floor = sizes[0] / read + sizes[1] / written
        floor += work(given, SAMPLES * LENGTH, solved) / flops if which is not None else 0.0
        error = decoded_errors(source, out)
        rows.append([name, round(attempts.wall_s, 1), round(attempts.cpu_s, 1), round(attempts.peak[0] / 1e9, 2),
                     round(sizes[0] / 1e9, 2), round(sizes[1] / 1e9, 2), round(floor, 1),
                     round(attempts.wall_s / floor, 2), round(error, 4)])  # fmt: skip
        facts[name] = {"killed at": attempts.kills, "bytes kept, compared": kept(source, out, which)}
        shutil.rmtree(out)
    passed = sum(row[1] for row in rows) <= 60 * MINUTES and max(row[3] for row in rows) <= MEMORY_BAR / 1e9
    return rows, {"passed": passed, "bars": {"minutes": MINUTES, "peak_gb": MEMORY_BAR / 1e9}, **facts,
                  "layers": options.layers, "experts": options.experts, "solved_block": solved,
                  "writing_the_checkpoint_s": round(making, 1), "load_before": round(load, 2)}  # fmt: skip


def main() -> None:
    """Parse and run; the report is only written for the size that the bars are for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=7)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--engram-gb", type=float, default=2.0)
    parser.add_argument("--scratch", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        rows, facts = benchmark(options, Path(name))
    if options.experts >= 32 and options.engram_gb >= 2:
        present("v41_large", COLUMNS, rows, facts)
    else:
        print(*rows, json.dumps(facts, indent=1), sep="\n")


if __name__ == "__main__":
    main()

"""2:4 against cost: dsc beside llm-compressor's SparseGPT and Wanda, and 2:4 with 4 bits in one order or together.

    python -m benchmarks.sparsity [--cases moe smollm2] [--only PATTERN ...] [--samples N]

The models, calibration tokens, judging windows and the evaluator are those of `benchmarks.accuracy`; one OpenMP thread,
CPU seconds of the whole command. Every linear of every side is checked to have two zeros in each four. Bars: one-shot
at most 0.6 of the best rival's KL on both texts, at most 3 times its CPU seconds; with ten minutes of training 0.35.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.accuracy import judge, last_line
from benchmarks.cases import DSC, Case, case
from benchmarks.common import ROOT, measure, present
from benchmarks.peers import RIVALS, PeerError, peer
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.models import Architecture
from deepseek_compress.numerics import pattern

COLUMNS = (
    "model",
    "method",
    "samples",
    "KL like",
    "KL other",
    "perplexity",
    "top-1",
    "CPU s",
    "wall s",
    "load",
    "note",
)
ONE_SHOT, TIMES, RECOVERED = 0.6, 3.0, 0.35
TRAINED = "  - distill: {teacher: model, minutes: 10}\n"
BY_BLOCK = "  - recover: {by_block: {passes: 2, batch_tokens: 512}, passes: 0}\n"
FOUR_BITS = "weights: {METHOD: {num_bits: 4, group_size: GROUP, symmetric: false}}"


class Row(NamedTuple):
    """A way to make 2:4 weights: what its recipe's stages are, or the rival's name of the method."""

    label: str
    stages: str = ""  # of a recipe of ours
    rival: str = ""
    bits: bool = False  # 4-bit weights too


def compressing(sparsity: str, weights: str = "") -> str:
    """A stage."""
    four = f", {FOUR_BITS.replace('METHOD', weights)}" if weights else ""
    return f"  - compress: {{sparsity: {sparsity}{four}}}\n"


ROWS = (
    Row("llm-compressor SparseGPT", rival="sparsegpt"),
    Row("llm-compressor Wanda", rival="wanda"),
    Row("dsc magnitude", compressing("magnitude")),
    Row("dsc sparsegpt", compressing("sparsegpt")),
    Row("dsc reconstruct", compressing("reconstruct")),
    Row("dsc reconstruct, by block", compressing("reconstruct") + BY_BLOCK),
    Row("dsc reconstruct, recovered 10 min", compressing("reconstruct") + TRAINED),
    Row("dsc sparsegpt, then gptq 4 bits", compressing("sparsegpt", "gptq"), bits=True),
    Row("dsc reconstruct, then gptq 4 bits", compressing("reconstruct", "gptq"), bits=True),
    Row("dsc reconstruct, then quantease 4 bits", compressing("reconstruct", "quantease"), bits=True),
)


def run(row: Row, subject: Case, samples: int, work: Path) -> dict[str, Any]:
    """Prune, decode, check, judge; a side that fails is a result with the reason."""
    result: dict[str, Any] = {"model": subject.name, "method": row.label, "samples": samples}
    result["load"] = round(os.getloadavg()[0], 1)
    try:
        command, out = prepared(row, subject, samples, work)
    except PeerError as error:
        return {**result, "note": str(error).splitlines()[0]}
    cost = measure(command, {"PYTHONPATH": str(ROOT) if row.stages else ""})
    if cost.returncode:
        return {**result, "note": f"failed: {last_line(cost.output)}"}
    result |= {"CPU s": round(cost.cpu_s, 1), "wall s": round(cost.wall_s, 1)}
    plain = out
    if row.rival:
        plain, script = work / "plain", str(RIVALS / "sparse_llmcompressor.py")
        decoded = measure([str(peer("llmcompressor")), script, "plain", str(subject.model), str(out), str(plain)])
        if decoded.returncode:
            return {**result, "note": f"its output could not be read: {last_line(decoded.output)}"}
    return {**result, "note": dense(plain), **judge(plain, subject, "judging")}


def prepared(row: Row, subject: Case, samples: int, work: Path) -> tuple[list[str], Path]:
    """The command that is timed, and where its output will lie."""
    if row.rival:
        script, out = str(RIVALS / "sparse_llmcompressor.py"), work / "out"
        files = [str(subject.model), str(subject.ids(samples)), str(out)]
        return [str(peer("llmcompressor")), script, "quantize", *files, row.rival], out
    recipe = work / "recipe.yaml"
    text = f"{{sources: ['{subject.calibration}'], samples: {samples}, length: {subject.length}}}"
    recipe.write_text(f"calibration: {text}\nstages:\n{row.stages.replace('GROUP', str(subject.group))}")
    last = next(name for name in ("distill", "recover", "compress") if f"- {name}:" in row.stages)
    command = [*DSC, "run", str(recipe), "--model", str(subject.model), "-o", str(work / "runs")]
    return command, work / "runs" / last


def dense(path: Path) -> str:
    """Which linears are not 2:4, in words; nothing where all are."""
    found = open_checkpoint(path)
    architecture = Architecture.of(found)
    names = [f"{block.prefix}{linear.name}.weight" for block in architecture.blocks for linear in block.linears]
    wrong = [name for name in names if not pattern.holds(found.read(name))]
    return f"{len(wrong)} of {len(names)} linears are not 2:4, e.g. {wrong[0]}" if wrong else ""


def bars(name: str, found: list[tuple[Row, dict[str, Any]]]) -> dict[str, Any]:
    """How ours stands to the best rival on each text of a model."""
    judged = [(row, result) for row, result in found if "windows" in result]
    rivals = [result for row, result in judged if row.rival]
    verdict: dict[str, Any] = {}
    for row, ours in judged:
        if row.rival or row.bits or not rivals:
            continue
        for text in ours["windows"]:
            best = min(rivals, key=lambda result: float(result[f"KL {text}"]))
            share = float(ours[f"KL {text}"]) / float(best[f"KL {text}"])
            cost = float(ours["CPU s"]) / float(best["CPU s"])
            recovered = "recovered" in row.label
            passed = share <= RECOVERED if recovered else share <= ONE_SHOT and cost <= TIMES
            facts = {"against": best["method"], "share_of_kl": round(share, 3), "share_of_cpu": round(cost, 2)}
            verdict[f"{name}, {row.label}, {text}"] = {**facts, "passed": passed}
    return verdict


def main() -> int:
    """Run the rows asked for and present them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["moe", "smollm2"])
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of names")
    parser.add_argument("--samples", type=int, help="windows of calibration text; fewer than the case's is quicker")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines, verdicts = [], {}
    for name in options.cases:
        subject, found = case(name), []
        samples = options.samples or subject.samples
        for row in ROWS:
            if not any(fnmatch(row.label, shell) for shell in options.only):
                continue
            work = Path(tempfile.mkdtemp(prefix="dsc-sparsity-"))
            result = run(row, subject, samples, work)
            shutil.rmtree(work)
            found.append((row, result))
            lines.append([result.get(column) for column in COLUMNS])
            print(f"{name}, {row.label}: {lines[-1]}", file=sys.stderr, flush=True)
            verdicts |= bars(name, found)
            facts = {"judged_on": "judging windows, which no calibration saw", "bars": verdicts}
            present("sparsity", COLUMNS, lines, facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

"""What does one 8-bit grid for each linear's input cost beside a scale for each token, and which estimator costs least?

    python -m benchmarks.static_ranges [--cases nano smollm2] [--samples N]

W8A8: weights of 8 bits and one scale a row, rounded to nearest after SmoothQuant has moved the outliers. All rows have
the same weights and differ in how inputs are rounded; the grids are found on the first N windows of the calibration
tokens of `benchmarks.accuracy` (as is what SmoothQuant moves), and everything is judged as there, on 20 windows of 512
tokens that nobody calibrated on: KL to the original, perplexity, agreement on the likeliest token. In float32, in one
process; the seconds are those that finding the grids took, its run over the text included.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy import original
from benchmarks.cases import LENGTH, SAMPLES, WINDOWS, Case, case
from benchmarks.common import present
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.compress import moved_scales, ranges
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.selection import CHANGEABLE, select
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.evaluation.divergence import measure as divergence
from deepseek_compress.models import Architecture
from deepseek_compress.models.activations import InputScheme
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.activations import Dynamic, Static
from deepseek_compress.numerics.migration import SmoothQuant
from deepseek_compress.numerics.ranges import ESTIMATORS
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Statistics

COLUMNS = ("model", "inputs", "KL", "perplexity", "top-1", "CPU s")
STATIC = [(name, True) for name in ESTIMATORS] + [("minmax", False), ("mse", False)]


def moved(subject: Case, samples: int, work: Path) -> tuple[Job, torch.Tensor]:
    """The model with SmoothQuant's scales moved, and the tokens."""
    architecture = Architecture.of(open_checkpoint(subject.model))
    weights = Rtn(num_bits=8, symmetric=True)
    solver = LinearSolver(select(architecture, frozenset(CHANGEABLE), weights), None, weights, 64)
    tokens = torch.from_numpy(np.load(subject.ids(SAMPLES)))[:samples]
    job = Job(architecture, solver, work)
    return moved_scales.migrate(job, tokens, SmoothQuant(alpha=0.5), lambda done, total, note: None), tokens


def rounded(job: Job) -> dict[str, torch.Tensor]:
    """Every tensor of the model, the linears of its blocks in 8 bits."""
    changed = {name for block in job.architecture.blocks for name in job.changed(block)}
    found = {name: job.source.read(name) for name in job.architecture.tensors}
    for name in changed:
        weight = found[name]
        found[name] = Rtn(num_bits=8, group_size=weight.shape[1], symmetric=True)(weight, Statistics()).dequantize()
    return found


def rows(subject: Case, samples: int, scratch: Path) -> list[dict[str, Any]]:
    """The rows of one model."""
    texts, trace = original(subject)
    job, tokens = moved(subject, samples, scratch / "moved")
    weights, lines = rounded(job), []

    def judge(label: str, scheme: InputScheme | None, seconds: float | None = None) -> None:
        found = divergence(Model(job.architecture.family, job.cfg, weights, scheme), texts, trace)
        kl, top = round(found.kl_divergence or 0.0, 5), round(found.top1_agreement or 0.0, 4)
        line = {"KL": kl, "perplexity": round(found.perplexity, 3), "top-1": top, "CPU s": seconds}
        lines.append({"model": subject.name, "inputs": label, **line})
        print(lines[-1], file=sys.stderr, flush=True)

    judge("16 bits", None)
    judge("dynamic, a scale a token", InputScheme(Dynamic()))
    for name, symmetric in STATIC:
        static = Static.model_validate({"estimator": name, "symmetric": symmetric})
        here = Job(job.architecture, job.solver, scratch / f"{name}-{symmetric}")
        began = time.process_time()
        found = ranges.find(here, tokens, static, frozenset(CHANGEABLE), lambda done, total, note: None)
        seconds = round(time.process_time() - began, 1)
        judge(f"static, {name}{'' if symmetric else ', zero points'}", InputScheme(None, inputs=found.inputs), seconds)
    return lines


def main() -> int:
    """Judge and present."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["nano", "smollm2"])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.cases:
            lines += rows(case(name), options.samples, Path(temporary) / name)
    facts = {
        "calibration": f"{options.samples} x {LENGTH} tokens",
        "judged_on": f"{WINDOWS} windows of {LENGTH} tokens not calibrated on",
    }
    present("static_ranges", COLUMNS, [[line.get(column) for column in COLUMNS] for line in lines], facts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

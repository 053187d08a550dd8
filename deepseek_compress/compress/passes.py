"""The passes over the blocks that a compression makes, and how long each takes, so that the time left is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepseek_compress import provenance
from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.compress import loss, packing
from deepseek_compress.compress.collection import collected
from deepseek_compress.compress.forecast import calibrated_cost, saved_work, tensor_work
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.models import Architecture, Block, Linear, Role
from deepseek_compress.planning.costs import Rates, Work
from deepseek_compress.planning.passes import USUAL, Passes, Progress
from deepseek_compress.planning.rates import rates

LINEAR = 3e-3  # seconds of a linear in a pass, whatever its size: calls, and its part of files; by experience
DECODED = 10  # bytes touched for a weight that is read and decoded
HASHED = 6  # bytes that are hashed while a weight is packed, by experience
COLUMN = 1.7e-4  # seconds that a sparse solution takes for a column on top of a rounding, by experience: calls of torch


def foreseen(
    progress: Progress,
    architecture: Architecture,
    solver: LinearSolver,
    text: tuple[int, int],
    before: Mapping[str, int],
    workers: int,
) -> Passes:
    """Foresee the passes `before` (name -> samples that are looked at), then "solve" and "judge".

    text: samples, and tokens of each; without samples no block is run.
    """
    samples, length = text
    known = rates(device=str(architecture.device)) or USUAL
    seconds = {
        name: _seconds(architecture, None, (min(count, samples), length), known, 1) for name, count in before.items()
    }
    if samples and solver.needs:
        seconds["solve"] = _seconds(architecture, solver, text, known, workers)
        paired = "cross_covariance" in solver.needs  # then the original has been run already
        if solver.sparsity is not None and not paired:
            seconds["judge"] = _seconds(architecture, None, (loss.judged(samples, length), length), known, 1)
    if samples and solver.needs:
        seconds["end"] = [sum(_hashing(architecture.source, known).values())]
    return Passes(progress, seconds)


def collecting_passes(
    progress: Progress, architecture: Architecture, fields: Sequence[str], text: Sequence[int], workers: int
) -> Passes:
    """Foresee the pass "collect", which sums the statistics `fields` over samples of so many tokens."""
    known, found = rates(device=str(architecture.device)) or USUAL, []
    samples, length = text
    for block in architecture.blocks:
        cost = collected(architecture.cfg, block, fields, samples, length)
        summed = known.seconds(cost.work) + known.task_seconds(cost.tasks, workers)
        found.append(summed + cost.size / known.written + _overhead(block, known))
    return Passes(progress, {"collect": found, "end": [sum(_hashing(architecture.source, known).values())]})


def _overhead(block: Block, rates: Rates) -> float:
    """Seconds that a pass over a block takes however little text there is: its weights are read and decoded."""
    weights = sum(linear.rows * linear.columns for linear in block.linears)
    return LINEAR * len(block.linears) + DECODED * weights / rates.touched


def _hashing(source: Checkpoint, rates: Rates) -> dict[str, float]:
    """Return the seconds of hashing each file of the source that is not listed with its hash."""
    return {
        file.name: rates.task_seconds(Work(packed=file.stat().st_size / HASHED), 1)
        for file in provenance.unhashed(source)
    }


def _seconds(
    architecture: Architecture, solver: LinearSolver | None, text: tuple[int, int], rates: Rates, workers: int
) -> list[float]:
    """Return the time of each block in a pass that solves its linears, or without a solver runs it."""
    paired = solver is not None and "cross_covariance" in solver.needs
    sparse = solver is not None and solver.sparsity is not None
    solves = 0 if solver is None else sparse + (solver.weights is not None)

    def seconds(block: Block, wanted: list[Linear]) -> float:
        cost = calibrated_cost(architecture.cfg, block.linears, wanted, *text, paired)
        return rates.seconds(cost.work) + rates.task_seconds(cost.tasks, workers)

    found = []
    for block in architecture.blocks:
        wanted = [linear for linear in block.linears if solver is not None and solver.wants(block, linear)]
        run, solved = seconds(block, []), seconds(block, wanted)
        columns = sum(linear.columns / (workers if linear.role is Role.EXPERT else 1) for linear in wanted)
        found.append(run + solves * (solved - run) + sparse * COLUMN * columns + _overhead(block, rates))
    return found


def of_parts(job: Job) -> dict[str, float]:
    """Return the seconds of each tensor of a job that reads no text, and of hashing each file of its source."""
    known = rates(device=str(job.architecture.device)) or USUAL
    linears = {
        name: (block, linear) for block in job.architecture.blocks for name, linear in job.changed(block).items()
    }
    found = _hashing(job.source, known)
    for info in job.tensors():
        once = info.name in job.rows or (
            info.name in linears and packing.rounding(job, *linears[info.name]) is not None
        )
        work = [tensor_work(info, info.name in linears and not once, once)]
        work += [saved_work(info)] if job.statistics is not None and info.name in linears else []
        found[info.name] = sum(known.task_seconds(part, 1) for part in work)
    return found

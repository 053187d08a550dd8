"""The passes over the blocks that a compression makes, and how long each takes, so that the time left is right."""

from __future__ import annotations

from collections.abc import Mapping

from deepseek_compress.compress import loss
from deepseek_compress.compress.forecast import calibrated_cost
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.models import Architecture, Block, Linear
from deepseek_compress.planning.costs import Rates
from deepseek_compress.planning.passes import USUAL, Passes, Progress
from deepseek_compress.planning.rates import rates

SPARSE = 4  # times that a sparse solution takes as long as a rounding, by experience: four columns at a time, in torch


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
    return Passes(progress, seconds)


def _seconds(
    architecture: Architecture, solver: LinearSolver | None, text: tuple[int, int], rates: Rates, workers: int
) -> list[float]:
    """Return the time of each block in a pass that solves its linears, or without a solver runs it."""
    paired = solver is not None and "cross_covariance" in solver.needs
    solves = 0 if solver is None else SPARSE * (solver.sparsity is not None) + (solver.weights is not None)

    def seconds(block: Block, wanted: list[Linear]) -> float:
        cost = calibrated_cost(architecture.cfg, block.linears, wanted, *text, paired)
        return rates.seconds(cost.work) + rates.task_seconds(cost.tasks, workers)

    found = []
    for block in architecture.blocks:
        wanted = [linear for linear in block.linears if solver is not None and solver.wants(block, linear)]
        run, solved = seconds(block, []), seconds(block, wanted)
        found.append(run + solves * (solved - run))
    return found

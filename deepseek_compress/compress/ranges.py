"""The grid of each linear's input, for static activations: found on calibration text in the model before it is rounded.

Linears that share an input share its grid, and what servers fuse shares an input. An expert that too few tokens reach
gets a grid as wide as those of all experts of its layer together. What was found is kept in the work directory, so
that an interrupted run has it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from deepseek_compress.compress.job import Job
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture, Block, Linear, Role
from deepseek_compress.numerics.activations import InputGrid, Static
from deepseek_compress.numerics.ranges import BINS
from deepseek_compress.numerics.ranges import Observer as RangeObserver
from deepseek_compress.streaming.collect import Collector, Look, collect_inputs, feeding
from deepseek_compress.streaming.loop import Facts, Progress

_Ends = tuple[float, float]


class Ranges(NamedTuple):
    """Grids of static activations by input, and notes about them."""

    inputs: dict[str, InputGrid]  # module by checkpoint name -> the grid of its input
    starved: int  # experts that were given what all of their layer have

    def notes(self) -> list[str]:
        """One line for the user."""
        if not self.starved:
            return []
        return [f"{self.starved} experts that too few tokens reached have the input ranges of their layer"]


def cost(architecture: Architecture) -> int:
    """Bytes of the histograms of the block that has most."""
    return 8 * BINS * max(len({linear.input for linear in block.linears}) for block in architecture.blocks)


def find(job: Job, tokens: Tensor, method: Static, roles: Collection[Role], progress: Progress) -> Ranges:
    """Find grids for the inputs of all linears of `roles`; `tokens` int64 (samples, length) of calibration text."""
    found = collect_inputs(job.architecture, tokens, job.work, "ranges", _Ranges(job, method, roles), progress)
    grids = {
        name: InputGrid(scale, zero, method.num_bits)
        for block in found
        for name, (scale, zero) in block["inputs"].items()
    }
    return Ranges(grids, sum(block["starved"] for block in found))


class _Ranges(Collector):
    """Follows the range of each input of a block."""

    def __init__(self, job: Job, method: Static, roles: Collection[Role]) -> None:
        self.job, self.method, self.roles = job, method, roles
        self.linears: list[Linear] = []
        self.sums: dict[str, RangeObserver] = {}

    def begin(self, block: Block) -> Look:
        """Feed each range with its input."""
        self.linears = [linear for linear in block.linears if linear.role in self.roles]
        self.sums = {linear.input: self.method.estimator.observer() for linear in self.linears}
        return _watch(self.linears, self.sums)

    def end(self, block: Block) -> Facts:
        """Return {"inputs": {module: [scale, zero point]}, "starved": experts}."""
        ends, starved = _ends(self.job, block, self.linears, self.sums, self.method)
        grids = {key: self.method.grid(*values) for key, values in ends.items()}
        inputs = {
            block.prefix + linear.name: [grids[linear.input].scale, grids[linear.input].zero_point]
            for linear in self.linears
            if linear.input in grids
        }
        return {"inputs": inputs, "starved": starved}


def _watch(linears: Iterable[Linear], sums: dict[str, RangeObserver]) -> Look:
    """Feed each observer with its input once, through the first linear that sees it."""
    first: dict[str, str] = {}
    for linear in linears:
        first.setdefault(linear.input, linear.name)
    return feeding({name: sums[key] for key, name in first.items()})


def _ends(
    job: Job, block: Block, linears: Sequence[Linear], sums: dict[str, RangeObserver], method: Static
) -> tuple[dict[str, _Ends], int]:
    """Find the ends of each input's grid, and of how many experts they are their layer's."""
    found: dict[str, _Ends] = {}
    for key, observer in sums.items():
        seen = observer.seen()
        if observer.tokens and not (math.isfinite(seen.low) and math.isfinite(seen.high)):
            what = f"{block.prefix}{key}: NaN or infinite values over the calibration text"
            raise DscError(what, "check the model; dsc evaluate runs it on text")
        if observer.tokens:
            found[key] = method.ends(seen)
    experts = [linear for linear in linears if linear.expert is not None]
    few = {linear.input for linear in experts if sums[linear.input].tokens < job.min_tokens}
    for part in dict.fromkeys(_part(linear) for linear in experts):
        same = [linear.input for linear in experts if _part(linear) == part]
        ends = [found[key] for key in same if key in found]
        widest = min(low for low, _ in ends), max(high for _, high in ends)
        found |= {key: widest for key in same if key in few}
    return found, len({linear.expert for linear in experts if linear.input in few})


def _part(linear: Linear) -> str:
    """Its name in its expert: "gate_proj"."""
    return linear.name.rpartition(".")[2]

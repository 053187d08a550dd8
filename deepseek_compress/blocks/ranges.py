"""The grid of each linear's input, for static activations: found on calibration text in the model before it is rounded.

Linears that share an input share its grid, and what servers fuse shares an input. An expert that too few tokens reach
gets a grid as wide as those of all experts of its layer together. What was found is kept in the work directory, so
that an interrupted run has it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from torch import Tensor

from deepseek_compress.blocks.job import Job
from deepseek_compress.blocks.walk import walked
from deepseek_compress.checkpoint.files import read_json, write_json
from deepseek_compress.errors import DscError
from deepseek_compress.models import Family, Linear, ModelConfig, Role
from deepseek_compress.numerics.activations import InputGrid, Static
from deepseek_compress.numerics.ranges import BINS, Observer

_Ends = tuple[float, float]


class Ranges(NamedTuple):
    """What was found."""

    inputs: dict[str, InputGrid]  # module by checkpoint name -> the grid of its input
    starved: int  # experts that were given what all of their layer have

    def told(self) -> list[str]:
        """One line for the user."""
        if not self.starved:
            return []
        return [f"{self.starved} experts that too few tokens reached have the input ranges of their layer"]


def cost(family: Family, cfg: ModelConfig) -> int:
    """Bytes of the histograms of the block that has most."""
    layers = range(cfg.num_hidden_layers)
    return 8 * BINS * max(len({linear.input for linear in family.linears(cfg, layer)}) for layer in layers)


def find(
    job: Job, tokens: Tensor, method: Static, roles: Collection[Role], progress: Callable[[int, int, str], None]
) -> Ranges:
    """Grids for the inputs of all linears of `roles`; `tokens` int64 (samples, length) of calibration text."""
    file = job.work / "ranges.json"
    if not file.is_file():
        inputs: dict[str, tuple[float, int]] = {}
        starved, total = 0, job.cfg.num_hidden_layers
        for layer, run in walked(job, tokens):
            progress(layer, total, f"ranges of block {layer}")
            linears = [linear for linear in job.family.linears(job.cfg, layer) if linear.role in roles]
            sums = {linear.input: method.estimator.observer() for linear in linears}
            run(_watch(linears, sums))
            ends, few = _ends(job, layer, linears, sums, method)
            starved += few
            for linear in linears:
                if linear.input in ends:
                    grid = method.grid(*ends[linear.input])
                    inputs[f"{job.family.prefix(layer)}.{linear.name}"] = grid.scale, grid.zero_point
        write_json(file, {"inputs": inputs, "starved": starved})
    found = read_json(file)
    grids = {name: InputGrid(scale, zero, method.num_bits) for name, (scale, zero) in found["inputs"].items()}
    return Ranges(grids, found["starved"])


def _watch(linears: Iterable[Linear], sums: dict[str, Observer]) -> Callable[[str, Tensor], None]:
    """Feeds each observer with its input once, through the first linear that sees it."""
    first: dict[str, str] = {}
    for linear in linears:
        first.setdefault(linear.input, linear.name)
    watched = {name: sums[key] for key, name in first.items()}

    def look(name: str, x: Tensor) -> None:
        if name in watched:
            watched[name].add(x)

    return look


def _ends(
    job: Job, layer: int, linears: Iterable[Linear], sums: dict[str, Observer], method: Static
) -> tuple[dict[str, _Ends], int]:
    """How far each input's grid reaches, and of how many experts that is their layer's."""
    found: dict[str, _Ends] = {}
    for key, observer in sums.items():
        seen = observer.seen()
        if observer.tokens and not (math.isfinite(seen.low) and math.isfinite(seen.high)):
            what = f"{job.family.prefix(layer)}.{key}: NaN or infinite values over the calibration text"
            raise DscError(what, "check the model; dsc evaluate runs it on text")
        if observer.tokens:
            found[key] = method.ends(seen)
    experts = [linear for linear in linears if linear.expert is not None]
    few = {linear.input for linear in experts if sums[linear.input].tokens < job.change.min_tokens}
    for part in dict.fromkeys(_part(linear) for linear in experts):
        same = [linear.input for linear in experts if _part(linear) == part]
        ends = [found[key] for key in same if key in found]
        widest = min(low for low, _ in ends), max(high for _, high in ends)
        found |= {key: widest for key in same if key in few}
    return found, len({linear.expert for linear in experts if linear.input in few})


def _part(linear: Linear) -> str:
    """Its name in its expert: "gate_proj"."""
    return linear.name.rpartition(".")[2]

"""State of a model's conversion to a graph: the model, the graph, and the naming of weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.export.graph import Array, Graph
from deepseek_compress.models.config import ModelConfig
from deepseek_compress.numerics.activations import InputGrid


class Weight(NamedTuple):
    """One linear, or the same linear of all experts stacked along a new first dimension."""

    label: str  # name of the initializer, without suffix: the checkpoint's, with * for the expert
    names: tuple[str, ...]  # checkpoint names, without ".weight"

    @property
    def stacked(self) -> bool:
        """Whether the weight has a leading dimension of experts."""
        return "*" in self.label


@dataclass(frozen=True)
class Build:
    """State that the emitters share while one model is written."""

    graph: Graph
    checkpoint: Checkpoint
    cfg: ModelConfig
    lower: Lowering
    accuracy_level: int = 4  # of MatMulNBits: 4 computes with 8-bit activations, 0 in float
    embedding_bits: int = 16  # 8: the embedding (and a tied head) in groups of 8-bit codes
    last_only: bool = False
    contrib: bool = False  # for onnxruntime: its own operators, and routed experts, for which TensorRT has no NonZero
    activation_bits: int = 8
    rounded: frozenset[str] = frozenset()  # linears that see integers instead of floats, by checkpoint name
    inputs: Mapping[str, InputGrid] = field(default_factory=dict)  # their grids, where those are static
    attention8: bool = False  # the products of attention in 8 bits too
    unsigned: bool = True  # whether 8-bit products take unsigned integers: TensorRT's don't


Lowering = Callable[[Build, str, Weight], str]


class Grids(NamedTuple):
    """A weight written to the graph: the codes' initializer, and what the scales are."""

    codes: str
    scale: Array  # float32 ([E,] groups, N)
    zero: Array  # float32 ([E,] groups, N), relative to the centre
    sums: Array  # float32 ([E,] 1, N): of the weight over its columns; zeros where inputs have no zero points
    num_bits: int
    group_size: int
    rows: int

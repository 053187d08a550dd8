"""Rounding a linear's input to integers in ONNX: x ~ d t.

Dynamic: t = max|x| / top per token, computed in the graph, and d = round(x / t). Static, where s and z are known at
export: q = clip(round(x / s + z), -128, 127), d = q - z, t = s.

Where a static input meets 8-bit codes with one scale a row, QuantizeLinear and DequantizeLinear stand around MatMul as
every run-time looks for them, with FP32 scales. TensorRT takes no zero points: there, and with weights in blocks, the
integers q themselves are multiplied (Q/DQ with scale 1), s is multiplied back, and what z adds is a constant row.
Elsewhere the grid is arithmetic on floats, so that no Q/DQ can meet weights in blocks (see `hazards`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from deepseek_compress.export.build import Build, Grids, Weight
from deepseek_compress.export.graph import Array, Graph
from deepseek_compress.numerics.activations import SMALLEST, InputGrid
from deepseek_compress.numerics.types import Quantized

LOW, HIGH = -128, 127  # static codes


class Fraction(NamedTuple):
    """x ~ (round(value) - zero) * scale, clipped where it is static."""

    value: str  # float32
    scale: str  # float32: a number a token, one in all, or one an expert
    zero: Array | None = None  # float32 scalar or (E, 1, 1); None: dynamic


def round_tokens(build: Build, x: str, axis: int = -1, top: int | None = None) -> tuple[str, str]:
    """d as float32, to be rounded, and its scale t, which has 1 along `axis`: x ~ t d. Rule of numerics.activations."""
    g, top = build.graph, top or (1 << (build.activation_bits - 1)) - 1
    wide = g.op("Cast", x, to=TensorProto.FLOAT)
    largest = g.op("ReduceMax", g.op("Abs", wide), g.ints(axis), keepdims=1)
    if build.contrib and axis == -1:
        # onnxruntime 1.31 gives a reduction over no rows the shape of its input; the slice makes it (0, 1) again
        largest = g.op("Slice", largest, g.ints(0), g.ints(1), g.ints(-1))
    t = g.op("Div", largest, g.scalar(top, np.float32))
    t = g.op("Where", g.op("Greater", t, g.scalar(SMALLEST, np.float32)), t, g.scalar(1, np.float32))
    return g.op("Div", wide, t), t


def fraction(build: Build, x: str, weight: Weight) -> Fraction:
    """x (tokens, K), or ([1 or] E, tokens, K) for stacked experts, each with a grid of its own."""
    if build.inputs:
        return _on_grids(build.graph, x, [build.inputs[name] for name in weight.names])
    return Fraction(*round_tokens(build, x))


def _on_grids(g: Graph, x: str, grids: Sequence[InputGrid]) -> Fraction:
    shape = () if len(set(grids)) == 1 else (-1, 1, 1)
    chosen = grids if shape else grids[:1]
    scale = g.constant(np.array([grid.scale for grid in chosen], np.float32).reshape(shape))
    zero = np.array([grid.zero_point for grid in chosen], np.float32).reshape(shape)
    value = g.op("Div", g.op("Cast", x, to=TensorProto.FLOAT), scale)
    return Fraction(g.op("Add", value, g.constant(zero)) if zero.any() else value, scale, zero)


def whole(g: Graph, found: Fraction) -> str:
    """d as float32."""
    d = g.op("Round", found.value)
    if found.zero is None:
        return d
    d = g.op("Clip", d, g.scalar(LOW, np.float32), g.scalar(HIGH, np.float32))
    return g.op("Sub", d, g.constant(found.zero)) if found.zero.any() else d


def on_integers(build: Build, x: str, weight: Weight, product: Callable[[str], str]) -> str:
    """product(d) * t, in float: what 8-bit activations mean where the product itself is not made of integers."""
    g, found = build.graph, fraction(build, x, weight)
    y = product(g.op("Cast", whole(g, found), to=g.elem_type))
    return g.op("Cast", g.op("Mul", g.op("Cast", y, to=TensorProto.FLOAT), found.scale), to=g.elem_type)


def qdq_grid(build: Build, weight: Weight, codes: Iterator[Quantized], zero_points: bool) -> InputGrid | None:
    """Return the static grid of the input, where Q/DQ around one product says everything. `zero_points`: they are
    taken.

    `codes` is looked at where there is a grid.
    """
    grid = None if weight.stacked else build.inputs.get(weight.names[0])
    if grid is None:
        return None
    found = next(codes)
    if found.num_bits <= 4 or found.scale.shape[1] > 1:
        return None
    return grid if zero_points or (found.symmetric and not grid.zero_point) else None


def qdq_product(build: Build, x: str, weight: Weight, grid: InputGrid, grids: Grids) -> str:
    """DQ(Q(x)) . DQ(codes), in float32 between. `grids`: the weight, as signed codes."""
    g = build.graph
    parts = [grids.codes, g.weight(f"{weight.label}.weight_scale", grids.scale[0])]
    if grids.zero.any():
        parts.append(g.weight(f"{weight.label}.weight_zero_point", grids.zero[0].astype(np.int8)))
    scale, zero = g.scalar(grid.scale, np.float32), g.constant(np.array(grid.zero_point, np.int8))
    q = g.op("QuantizeLinear", g.op("Cast", x, to=TensorProto.FLOAT), scale, zero)
    d = g.op("DequantizeLinear", q, scale, *([zero] if grid.zero_point else []))
    return g.op("Cast", g.op("MatMul", d, g.op("DequantizeLinear", *parts, axis=1)), to=g.elem_type)

"""Rounding inside an ONNX file, and a copy of the file that rounds nothing but weights.

Rounding is not continuous: a difference of 1e-7 next to half an 8-bit step becomes a whole step, which then moves
others, so that two correct computations of one 8-bit model are as far apart as rounding moves either. Without it they
agree to the last bits. `without_rounding` makes that copy: Round, Clip, QuantizeLinear and DequantizeLinear of
activations become Identity, MatMulNBits computes in floats (accuracy level 0). Weights, which no input reaches, stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import torch
from onnx import helper
from torch import Tensor

from deepseek_compress.numerics.activations import SMALLEST

_STEPS = {"Round", "Clip", "QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Blocks:
    """Level 4 of MatMulNBits: x rounded to 8 bits, symmetrically, in blocks of `size` channels."""

    size: int

    def __call__(self, x: Tensor) -> Tensor:
        """x (..., K) -> the same shape."""
        parts = x.reshape(*x.shape[:-1], -1, self.size)
        t = parts.abs().amax(-1, keepdim=True) / 127
        t = torch.where(t > 0, t, 1.0)
        return ((parts / t).round() * t).reshape(x.shape)


def rounded_rows(weight: Tensor, size: int) -> Tensor:
    """(rows, columns) on the 8-bit grid that a file has onnxruntime make at load (`export.onnx`)."""
    groups = weight.reshape(len(weight), -1, size)
    scale = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=SMALLEST)
    return ((groups / scale).round() * scale).reshape(weight.shape)


def in_blocks(model: onnx.ModelProto) -> Mapping[str, Blocks]:
    """Return the linears that MatMulNBits computes at level 4, by checkpoint name."""
    nodes = (node for node in model.graph.node if node.op_type == "MatMulNBits")
    knobs = ((node.name.rpartition("/")[0], {a.name: a.i for a in node.attribute}) for node in nodes)
    return {name: Blocks(found["block_size"]) for name, found in knobs if found["accuracy_level"] == 4}


def without_rounding(model: onnx.ModelProto) -> onnx.ModelProto | None:
    """Return the copy described above, its weights left outside; None where nothing is rounded."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    moving = {value.name for value in copy.graph.input}  # what depends on an input
    changed = False
    for node in copy.graph.node:
        if node.op_type == "MatMulNBits":
            for attribute in node.attribute:
                if attribute.name == "accuracy_level" and attribute.i == 4:
                    attribute.i, changed = 0, True
        if moving.isdisjoint(node.input):
            continue
        moving.update(node.output)
        if node.op_type in _STEPS:
            node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output, name=node.name))
            changed = True
    return copy if changed else None

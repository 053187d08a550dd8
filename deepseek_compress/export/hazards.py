"""Two graphs that TensorRT compiles without a word into wrong numbers. Nothing here may write or build them.

Both were found by reading engine plans (TensorRT-RTX 1.7.1):

1. A weight dequantised in *blocks* and a quantised activation (Q/DQ) in one MatMul. The plan is an integer product over
   the whole of K, multiplied by the scales of group 0 only. Blocks whose scales are all 1 are meant for unpacking
   and are re-quantised per tensor before they meet an activation.
2. 8-bit operands with scales narrower than FP32. The product is written as a raw accumulator in the scale's type before
   the scale is applied; an FP16 one overflows at 65504, for Gaussian inputs with K = 4096 in a third of the outputs.

`find` looks at the nodes of a whole model, so that it also judges files that others wrote.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx
from onnx import TensorProto

from deepseek_compress.errors import DscError

_LAYOUT = {"Cast", "Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze", "Expand", "Flatten", "Slice", "Concat"}
_PRODUCTS = {"MatMul", "Gemm"}
_BYTES = {TensorProto.INT8, TensorProto.UINT8, TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2}
_NARROW = {TensorProto.FLOAT16, TensorProto.BFLOAT16}


def find(nodes: Iterable[onnx.NodeProto], tensors: Iterable[onnx.TensorProto]) -> list[DscError]:
    """Every product in `nodes` that would be compiled wrongly. `tensors` are the model's initializers."""
    made = {output: node for node in nodes for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in tensors}
    problems: list[DscError] = []
    for node in {id(node): node for node in made.values()}.values():
        if node.op_type in _PRODUCTS:
            problems += _judge(node, made, types)
    return problems


def find_in_model(model: onnx.ModelProto) -> list[DscError]:
    """`find` for a whole model."""
    return find(model.graph.node, model.graph.initializer)


def integer_products(model: onnx.ModelProto) -> list[str]:
    """Names of the products whose two operands are 8-bit."""
    made = {output: node for node in model.graph.node for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return [
        node.name
        for node in model.graph.node
        if node.op_type in _PRODUCTS
        and all(any(_is_byte(d, made, types) for d in _dequantizers(name, made)) for name in node.input[:2])
    ]


def _judge(node: onnx.NodeProto, made: dict[str, onnx.NodeProto], types: dict[str, int]) -> Iterator[DscError]:
    operands = [list(_dequantizers(name, made)) for name in node.input[:2]]
    for blocks, other in (operands, operands[::-1]):
        if any(_attribute(d, "block_size") for d in blocks) and any(_computed(d, made) for d in other):
            yield DscError(
                f"{node.name}: block-wise weights meet quantised activations in one product",
                "TensorRT would use the first group's scale for all; multiply group by group",
            )
            break
    both = all(any(_is_byte(d, made, types) for d in operand) for operand in operands)
    narrow = [d for operand in operands for d in operand if types.get(d.input[1]) in _NARROW]
    if both and narrow:
        yield DscError(
            f"{node.name}: 8-bit operands with 16-bit scales ({narrow[0].name})",
            "the accumulator would overflow; give the scales in float32",
        )


def _dequantizers(name: str, made: dict[str, onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield the DequantizeLinear nodes that `name` comes from through nodes that only move data."""
    node = made.get(name)
    if node is None:
        return
    if node.op_type == "DequantizeLinear":
        yield node
    elif node.op_type in _LAYOUT:
        for source in node.input if node.op_type == "Concat" else node.input[:1]:
            yield from _dequantizers(source, made)


def _quantizer(name: str, made: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    node = made.get(name)
    while node is not None and node.op_type in _LAYOUT:
        node = made.get(node.input[0])
    return node if node is not None and node.op_type == "QuantizeLinear" else None


def _computed(dequantizer: onnx.NodeProto, made: dict[str, onnx.NodeProto]) -> bool:
    """Whether it undoes a quantisation made while the model runs."""
    return _quantizer(dequantizer.input[0], made) is not None


def _is_byte(dequantizer: onnx.NodeProto, made: dict[str, onnx.NodeProto], types: dict[str, int]) -> bool:
    return _computed(dequantizer, made) or types.get(dequantizer.input[0]) in _BYTES


def _attribute(node: onnx.NodeProto, name: str) -> int:
    return next((a.i for a in node.attribute if a.name == name), 0)

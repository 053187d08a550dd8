"""The two graphs that TensorRT compiles into wrong numbers can't be written, nor built when others wrote them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from deepseek_compress.errors import DscError
from deepseek_compress.export import hazards
from deepseek_compress.export.graph import Graph

K, N, G = 64, 32, 16


def rounded(graph: Graph, x: str, scale: str) -> str:
    quantised = graph.op("QuantizeLinear", x, scale, graph.constant(np.array(0, np.int8)))
    return graph.op("DequantizeLinear", quantised, scale)


def blocks(graph: Graph, dtype: type) -> str:
    codes = graph.weight("w", np.zeros((K, N), np.int8))
    return graph.op("DequantizeLinear", codes, graph.weight("s", np.ones((K // G, N), dtype)), axis=0, block_size=G)


@pytest.mark.parametrize("through", [(), ("Cast",), ("Transpose", "Transpose")])
def test_blocks_never_meet_rounded_activations(tmp_path: Path, through: tuple[str, ...]) -> None:
    with Graph(tmp_path / "m.onnx") as graph:
        weight = blocks(graph, np.float32)
        for step in through:
            knobs = {"to": TensorProto.FLOAT} if step == "Cast" else {"perm": [1, 0]}
            weight = graph.op(step, weight, **knobs)
        x = graph.input("x", TensorProto.FLOAT, ["n", K])
        y = graph.op("MatMul", rounded(graph, x, graph.scalar(0.1)), weight)
        graph.output(graph.op("Identity", y, named="y"), TensorProto.FLOAT, ["n", N])
        with pytest.raises(DscError, match="block-wise"):
            graph.save({})
    assert not list(tmp_path.iterdir())


def test_narrow_scales_never_meet_bytes(tmp_path: Path) -> None:
    with Graph(tmp_path / "m.onnx", "float16") as graph:
        codes = graph.weight("w", np.zeros((K, N), np.int8))
        weight = graph.op("DequantizeLinear", codes, graph.weight("s", np.ones(N, np.float16)), axis=1)
        x = graph.input("x", TensorProto.FLOAT16, ["n", K])
        y = graph.op("MatMul", rounded(graph, x, graph.scalar(0.1)), weight)
        graph.output(graph.op("Identity", y, named="y"), TensorProto.FLOAT16, ["n", N])
        with pytest.raises(DscError, match="16-bit scales"):
            graph.save({})


def test_blocks_with_float_activations_are_fine(tmp_path: Path) -> None:
    with Graph(tmp_path / "m.onnx") as graph:
        x = graph.input("x", TensorProto.FLOAT, ["n", K])
        graph.output(graph.op("MatMul", x, blocks(graph, np.float32), named="y"), TensorProto.FLOAT, ["n", N])
        assert graph.save({}).is_file()


def test_a_foreign_file_is_judged_too() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "sx", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "sx", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "s"], ["v"], axis=0, block_size=G),
        helper.make_node("MatMul", ["d", "v"], ["y"], name="product"),
    ]
    tensors = [
        numpy_helper.from_array(np.zeros((K, N), np.int8), "w"),
        numpy_helper.from_array(np.ones((K // G, N), np.float32), "s"),
        numpy_helper.from_array(np.float32(1), "sx"),
        numpy_helper.from_array(np.int8(0), "z"),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors))
    (problem,) = hazards.find_in_model(model)
    assert "product" in problem.what
    assert hazards.integer_products(model) == ["product"]

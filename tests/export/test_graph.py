from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper

from deepseek_compress.errors import DscError
from deepseek_compress.export.graph import Graph, pack_nibbles


@given(st.lists(st.integers(-8, 15), min_size=1, max_size=40))
def test_nibbles_come_back(values: list[int]) -> None:
    packed = np.frombuffer(pack_nibbles(np.array(values, np.int16)), np.uint8)
    back = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[: len(values)]
    assert (back == np.array(values) % 16).all()


def test_tensors_and_types_survive_the_external_file(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    wide = generator.standard_normal((300, 7)).astype(np.float32)
    codes = generator.integers(-8, 8, (64, 33))
    with Graph(tmp_path / "m.onnx") as graph:
        x = graph.input("x", TensorProto.FLOAT, ["n", 300])
        y = graph.op("MatMul", x, graph.weight("wide", wide))
        graph.weight4("codes", codes, signed=True)
        graph.output(graph.op("Identity", y, named="y"), TensorProto.FLOAT, ["n", 7])
        graph.save({"made": "here"})
    model = onnx.load(str(tmp_path / "m.onnx"))
    onnx.checker.check_model(model)
    tensors = {t.name: t for t in model.graph.initializer}
    assert np.array_equal(numpy_helper.to_array(tensors["wide"]), wide)
    assert np.array_equal(numpy_helper.to_array(tensors["codes"]).astype(np.int64), codes)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]


def test_equal_nodes_are_one_node(tmp_path: Path) -> None:
    with Graph(tmp_path / "m.onnx") as graph:
        x = graph.input("x", TensorProto.FLOAT, [4])
        first = graph.op("ReduceSum", x, graph.ints(0), keepdims=0)
        assert graph.op("ReduceSum", x, graph.ints(0), keepdims=0) == first
        assert graph.op("ReduceSum", x, graph.ints(0), keepdims=1) != first
        assert graph.count == 2


def test_leaving_by_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def stopped() -> None:
        with Graph(tmp_path / "m.onnx") as graph:
            graph.weight("w", np.zeros((64, 64), np.float32))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert not list(tmp_path.iterdir())


def test_a_name_is_written_once_and_float_types_are_known(tmp_path: Path) -> None:
    with Graph(tmp_path / "m.onnx") as graph:
        graph.weight("w", np.zeros(3, np.float32))
        with pytest.raises(ValueError, match="twice"):
            graph.weight("w", np.zeros(3, np.float32))
    with pytest.raises(DscError, match="float64"):
        Graph(tmp_path / "n.onnx", "float64")

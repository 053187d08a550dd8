"""Static activations in ONNX and engines, by value: float64 for each lowering, the runtime for whole models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.export import hazards, plan
from deepseek_compress.export.build import Build, Weight
from deepseek_compress.export.graph import Graph
from deepseek_compress.export.lowering import LOWERINGS
from deepseek_compress.export.onnx import export_onnx
from deepseek_compress.export.tensorrt import Range, build_engine
from deepseek_compress.export.verify import random_prompts, verify
from deepseek_compress.generation.backends.onnx import open_session
from deepseek_compress.numerics.activations import InputGrid
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress

from .test_lowering import COLUMNS, EXPERTS, NAMES, ROWS, TOKENS, Memory, quantised, reference

W8: dict[str, Any] = {"rtn": {"num_bits": 8, "symmetric": True}}
W4: dict[str, Any] = {"rtn": {"num_bits": 4, "group_size": 32}}
PROMPTS = random_prompts(512, (7, 20))


def grids(symmetric: bool) -> dict[str, InputGrid]:
    """Another for each expert; the first one clips."""
    return {name: InputGrid.over(-0.8 - e, 2.0 + e, 8, symmetric) for e, name in enumerate(NAMES)}


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "group", "plain"),
    [(4, 32, False), (4, 128, True), (8, 128, True), (8, 128, False), (8, 64, False)],
)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_value(
    tmp_path: Path, lowering: str, bits: int, group: int, plain: bool, symmetric: bool, stacked: bool
) -> None:
    weights, inputs = quantised(bits, group, plain), grids(symmetric)
    names = NAMES if stacked else NAMES[:1]
    x = np.random.default_rng(0).standard_normal((TOKENS, COLUMNS)).astype(np.float32)
    x[1] *= 1e3
    x[2] = 0
    path = tmp_path / "m.onnx"
    with Graph(path) as graph:
        memory: Any = Memory(weights)
        knobs: dict[str, Any] = {"accuracy_level": 0, "rounded": frozenset(NAMES), "inputs": inputs}
        build = Build(graph, memory, None, LOWERINGS[lowering], **knobs)  # type: ignore[arg-type]
        value = graph.input("x", graph.elem_type, ["n", COLUMNS])
        value = graph.op("Unsqueeze", value, graph.ints(0)) if stacked else value
        y = build.lower(build, value, Weight("experts.*.up" if stacked else NAMES[0], names))
        shape = [EXPERTS, "n", ROWS] if stacked else ["n", ROWS]
        graph.output(graph.op("Identity", y, named="y"), graph.elem_type, shape)
        graph.save({})  # raises for a product that TensorRT would compile wrongly
    have = open_session(path).run(None, {"x": x})[0]
    seen = [inputs[name](torch.from_numpy(x)).numpy() for name in names]
    want = np.stack([reference(rounded, weights[name], False) for rounded, name in zip(seen, names, strict=True)])
    want = want if stacked else want[0]
    assert not have[..., 2, :].any(), "zeros stay zeros"
    assert (np.abs(have - want) <= 5e-6 * np.abs(want).max(-1, keepdims=True) + 1e-12).all()


@pytest.fixture(scope="module")
def compressed(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def make(source: Path, weights: dict[str, Any], symmetric: bool = True) -> Path:
        knobs = {"weights": weights, "activations": {"static": {"symmetric": symmetric}}}
        key = f"{source} {knobs}"
        if key not in made:
            out = tmp_path_factory.mktemp(source.name) / "out"
            calibration = {"sources": [str(text)], "samples": 4, "length": 48}
            context = Context("out", out, "", 0, calibration, tell=lambda line: None, workers=1)
            made[key] = Compress.model_validate(knobs).run(open_checkpoint(source), context).path
        return made[key]

    return make


@pytest.mark.parametrize(
    ("name", "weights", "symmetric", "lowering"),
    [
        ("tiny_qwen2", W8, True, "standard"),
        ("tiny_llama", W8, False, "standard"),
        ("tiny_llama", W8, False, "tensorrt"),
        ("tiny_v3_bf16", W4, False, "matmulnbits"),
        ("tiny_v3_bf16", W4, False, "tensorrt"),
    ],
)
def test_models_agree_with_the_runtime(
    name: str,
    weights: dict[str, Any],
    symmetric: bool,
    lowering: str,
    compressed: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    source = open_checkpoint(compressed(request.getfixturevalue(name), weights, symmetric))
    export_onnx(source, tmp_path / "model.onnx", lowering, accuracy_level=0)
    found = verify(tmp_path / "model.onnx", source, PROMPTS, decoded=4)
    assert found.holds, found.facts()
    assert found.rounded_kl is not None


def test_w8a8_is_an_integer_product_in_every_target(
    tiny_qwen2: Path, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    source = open_checkpoint(compressed(tiny_qwen2, W8))
    for lowering in ("standard", "matmulnbits", "tensorrt"):
        export_onnx(source, tmp_path / f"{lowering}.onnx", lowering, dtype="float16")
        model = onnx.load(str(tmp_path / f"{lowering}.onnx"), load_external_data=False)
        assert len(hazards.integer_products(model)) == 14, "seven linears in each of two blocks"
        kinds = [node.op_type for node in model.graph.node]
        assert kinds.count("QuantizeLinear") == 8, "q, k and v share one, gate and up another"
        assert kinds.count("MatMulNBits") <= 1, "but for the head"


@pytest.mark.parametrize(("weights", "symmetric"), [(W8, True), (W4, False)])
def test_engines_multiply_in_8_bits(
    weights: dict[str, Any], symmetric: bool, tiny_qwen2: Path, compressed: Callable[..., Path], tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    source = open_checkpoint(compressed(tiny_qwen2, weights, symmetric))
    export_onnx(source, tmp_path / "model.onnx", "tensorrt", dtype="float16")
    sizes: dict[str, Any] = {"batch": Range(1, 2, 2), "new": Range(1, 1, 16), "past": Range(0, 8, 32)}
    build_engine(tmp_path / "model.onnx", tmp_path / "model.engine", compute_capabilities=["sm89"], **sizes)
    found = plan.read_plan(tmp_path / "model.engine")
    want = plan.expected(onnx.load(str(tmp_path / "model.onnx"), load_external_data=False))
    assert not plan.check_plan(found, want)
    assert found.facts()["products"]["int8 x int8 -> float"] >= 8

"""Each lowering by value: one linear in a graph of its own, in onnxruntime, against float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from deepseek_compress.export.build import Build, Weight
from deepseek_compress.export.graph import Graph
from deepseek_compress.export.lowering import LOWERINGS
from deepseek_compress.generation.backends.onnx import open_session
from deepseek_compress.numerics.types import Quantized

COLUMNS, ROWS, EXPERTS, TOKENS = 128, 48, 3, 5
NAMES = tuple(f"experts.{e}.up" for e in range(EXPERTS))


class Memory:
    """A checkpoint of quantised weights in memory."""

    def __init__(self, weights: dict[str, Quantized]) -> None:
        self.weights = weights
        shape = (ROWS, COLUMNS)
        info = SimpleNamespace(encoding="packed", shape=shape, dtype=torch.int32)
        self.header = SimpleNamespace(tensors={f"{name}.weight": info for name in weights})

    def read_quantized(self, name: str) -> Quantized:
        return self.weights[name.removesuffix(".weight")]

    def read(self, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return self.read_quantized(name).dequantize(dtype)


def quantised(bits: int, group: int, symmetric: bool) -> dict[str, Quantized]:
    generator = torch.Generator().manual_seed(bits * 1000 + group)
    top = 1 << bits
    found = {}
    for name in NAMES:
        codes = torch.randint(0, top, (ROWS, COLUMNS), generator=generator, dtype=torch.uint8)
        scale = (0.01 + 0.05 * torch.rand(ROWS, COLUMNS // group, generator=generator)).bfloat16().float()
        zero = torch.randint(0, top, scale.shape, generator=generator, dtype=torch.uint8)
        zero = torch.full_like(zero, top // 2) if symmetric else zero
        found[name] = Quantized(codes, scale, zero, bits, symmetric)
    return found


def reference(x: np.ndarray[Any, Any], weight: Quantized, rounded: bool) -> np.ndarray[Any, Any]:
    """Element by element in float64, from the definition."""
    x = x.astype(np.float64)
    if rounded:
        scale = (np.abs(x).max(-1, keepdims=True).astype(np.float32) / np.float32(127)).astype(np.float64)
        scale[scale == 0] = 1
        x = np.round((x / scale).astype(np.float32)) * scale
    codes, scale, zero = (t.double().numpy() for t in (weight.codes, weight.scale, weight.zero_point))
    size = weight.group_size
    y = np.zeros((*x.shape[:-1], ROWS))
    for row in range(ROWS):
        for group in range(COLUMNS // size):
            part = slice(group * size, (group + 1) * size)
            y[..., row] += x[..., part] @ ((codes[row, part] - zero[row, group]) * scale[row, group])
    return y


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 32, False), (4, 128, True), (8, 128, True), (8, 64, False)]
)
@pytest.mark.parametrize("lowering", LOWERINGS)
def test_value(
    tmp_path: Path, lowering: str, bits: int, group: int, symmetric: bool, rounded: bool, stacked: bool
) -> None:
    weights = quantised(bits, group, symmetric)
    names = NAMES if stacked else NAMES[:1]
    weight = Weight("experts.*.up" if stacked else NAMES[0], names)
    x = np.random.default_rng(0).standard_normal((TOKENS, COLUMNS)).astype(np.float32)
    x[1] *= 1e3  # a token with a far larger range
    x[2] = 0
    path = tmp_path / "m.onnx"
    with Graph(path) as graph:
        build = Build(
            graph,
            Memory(weights),  # type: ignore[arg-type]
            None,  # type: ignore[arg-type]
            LOWERINGS[lowering],
            accuracy_level=0,
            rounded=frozenset(NAMES if rounded else ()),
        )
        value = graph.input("x", graph.elem_type, ["n", COLUMNS])
        value = graph.op("Unsqueeze", value, graph.ints(0)) if stacked else value
        y = build.lower(build, value, weight)
        graph.output(
            graph.op("Identity", y, named="y"), graph.elem_type, [EXPERTS, "n", ROWS] if stacked else ["n", ROWS]
        )
        graph.save({})
    have = open_session(path).run(None, {"x": x})[0]
    want = np.stack([reference(x, weights[name], rounded) for name in names])
    want = want if stacked else want[0]
    size = np.abs(want).max(-1, keepdims=True)
    assert not have[..., 2, :].any()
    assert (np.abs(have - want) <= 3e-6 * size + 1e-12).all()


def test_names_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    weights = quantised(4, 32, False)
    with Graph(tmp_path / "m.onnx") as graph:
        build = Build(graph, Memory(weights), None, LOWERINGS["tensorrt"])  # type: ignore[arg-type]
        x = graph.input("x", graph.elem_type, ["n", COLUMNS])
        build.lower(build, x, Weight(NAMES[0], NAMES[:1]))
        assert all(graph.has(f"{NAMES[0]}.{part}") for part in ("weight", "weight_scale", "weight_correction"))


def test_experts_on_different_grids_are_refused(tmp_path: Path) -> None:
    weights = quantised(4, 32, False) | {NAMES[1]: quantised(4, 64, False)[NAMES[1]]}
    with Graph(tmp_path / "m.onnx") as graph:
        build = Build(graph, Memory(weights), None, LOWERINGS["tensorrt"])  # type: ignore[arg-type]
        x = graph.input("x", graph.elem_type, [1, "n", COLUMNS])
        with pytest.raises(Exception, match=NAMES[1]):
            build.lower(build, x, Weight("experts.*.up", NAMES))

"""Graphs of DeepSeek-V3.2 and V4 against the runtime by value: prefill, decode, and a text in any pieces."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.export.onnx import export_onnx
from deepseek_compress.export.targets import graph
from deepseek_compress.export.verify import OnnxModel, random_prompts, verify
from deepseek_compress.generation.backends.graph import GraphBackend, GraphModel
from deepseek_compress.generation.backends.onnx import OnnxRunner
from deepseek_compress.models.runtime import Model
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.stages.export import Export
from tests.models.conftest import clear_v4, clear_v32

__all__ = ["clear_v4", "clear_v32"]

FAMILIES = ("clear_v32", "clear_v4")
TOKENS = np.array(random_prompts(512, (70, 70)), np.int64)  # more than the indexers choose, and several full windows


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its graph."""
    model, out = request.getfixturevalue(request.param), tmp_path_factory.mktemp("graph") / "model.onnx"
    export_onnx(open_checkpoint(model), out)
    return model, out


def pieces_of(model: OnnxModel, lengths: list[int]) -> np.ndarray[Any, Any]:
    """Logits of TOKENS in calls of these lengths."""
    model.start(len(TOKENS))
    ends = np.cumsum([0, *lengths])
    return np.concatenate([model.step(TOKENS[:, a:b]) for a, b in pairwise(ends)], axis=1)


def test_a_text_in_any_pieces_equals_the_runtime(plain: tuple[Path, Path]) -> None:
    model = OnnxModel(plain[1])
    with torch.no_grad():
        want = Model.load(plain[0]).forward(torch.from_numpy(TOKENS)).numpy()
    for lengths in ([70], [58, *[1] * 12], [3, 1, 1, 20, 7, 1, 1, 1, 35]):
        worst = np.abs(pieces_of(model, lengths) - want).max() / np.abs(want).max()
        assert worst < 1e-5, lengths


def test_the_indexer_decides(plain: tuple[Path, Path]) -> None:
    """One that chooses everything gives other logits: the tests above would see a choice that is wrong."""
    model = Model.load(plain[0])
    assert model.cfg.indexer is not None
    every = dataclasses.replace(model.cfg, indexer=dataclasses.replace(model.cfg.indexer, top_k=512))
    with torch.no_grad():
        want, other = (
            Model(model.family, cfg, model.weights).forward(torch.from_numpy(TOKENS)) for cfg in (model.cfg, every)
        )
    errors = (want - other).abs().amax((0, 2)) / want.abs().max()
    sizes = {"deepseek_v32": 24, "deepseek_v4": 4 * (6 + 1) - 1}  # tokens until there is more than is chosen
    first = sizes[model.cfg.model_type]
    assert float(errors[:first].max()) < 1e-6
    assert float(errors[first:].max()) > 1e-3


@pytest.mark.verify
@pytest.mark.parametrize("lowering", ["plain", "standard", "matmulnbits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantised_and_decoded_greedily(
    family: str, lowering: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    knobs = {"weights": {"rtn": {"group_size": 16}}, "requantize": True, "keep": ["router", "norm"]}
    stage = build(Compress, knobs, "compress")
    stage.run(
        open_checkpoint(request.getfixturevalue(family)), Context("c", tmp_path / "w4", "", 0, tell=lambda line: None)
    )
    source = open_checkpoint(tmp_path / "w4")
    export_onnx(source, tmp_path / "model.onnx", lowering, accuracy_level=0)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    found = verify(tmp_path / "model.onnx", source, random_prompts(512, (40, 44)), decoded=6)
    assert found.holds, found
    assert found.worst < 1e-5
    assert found.agreed == found.decoded == 12


@pytest.mark.verify
def test_block_by_block_too(tmp_path: Path, clear_v4: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "RESIDENT", 0)
    told: list[str] = []
    stage = Export.model_validate({"target": "onnxruntime"})
    source = open_checkpoint(clear_v4)
    assert stage.problems(source.header) == []
    output = stage.run(source, Context("export", tmp_path / "out", "", 0, tell=told.append))
    assert "compared with the runtime block by block" in told
    found = output.facts["verification"]
    assert found["holds"], found
    assert found["worst"] < 1e-5


def test_v4_begins_again_where_it_cannot_cut_its_cache_and_takes_no_padding(clear_v4: Path, tmp_path: Path) -> None:
    """Entries begin where a row does: a padded batch would be plausible and wrong, so that it gives no number."""
    export_onnx(open_checkpoint(clear_v4), tmp_path / "model.onnx")
    runner = OnnxRunner(tmp_path / "model.onnx")
    backend = GraphBackend(runner)
    ids = TOKENS[0].tolist()
    whole = backend.prefill(ids[:30])
    assert backend.truncate(20) == 0
    assert np.array_equal(backend.feed(ids[:30]), whole)
    model = GraphModel(runner)
    model.start(2)
    mask = np.ones((2, 12), np.int64)
    mask[1, :3] = 0
    assert np.isnan(model.step(TOKENS[:, :12], mask)).all()


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx", "genai", "gguf", "edge-llm"])
def test_what_a_target_cannot_express_is_one_line_before_anything_is_read(target: str, clear_v4: Path) -> None:
    header = open_checkpoint(clear_v4).header
    found = [str(problem) for problem in Export.model_validate({"target": target}).problems(header)]
    assert any(line.startswith("deepseek_v4: ") and "\n" not in line for line in found), found

"""The check that holds one block at a time against the one that holds the model: same files, same verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.export import parts as cutting
from deepseek_compress.export.onnx import export_onnx, hidden_name
from deepseek_compress.export.parts import Parts
from deepseek_compress.export.verify import Agreement, random_prompts, verify
from deepseek_compress.export.verify_streamed import Limits, memory, verify_streamed
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.export import Export

from .conftest import Quantise

PROMPTS = random_prompts(512, (5, 19, 24))


def streamed(path: Path, source: Checkpoint, dtype: str = "float32") -> Agreement:
    return verify_streamed(path, source, PROMPTS, path.parent / "work", Limits(), dtype)


@pytest.mark.parametrize(
    ("family", "scheme", "lowering", "knobs"),
    [
        pytest.param("tiny_v3", None, "plain", {}, marks=pytest.mark.verify),
        ("tiny_v3", "w4a8", "matmulnbits", {}),
        pytest.param("tiny_v2", "w4a8-attention", "standard", {}, marks=pytest.mark.verify),
        pytest.param(
            "tiny_qwen2", "w4a16", "matmulnbits", {"embedding_bits": 8, "last_only": True}, marks=pytest.mark.verify
        ),
        ("tiny_llama", "w4a16", "matmulnbits", {}),
    ],
)
def test_block_by_block_says_what_the_whole_model_says(
    tmp_path: Path, request: pytest.FixtureRequest, quantised: Quantise, family: str, scheme: str | None,
    lowering: str, knobs: dict[str, object],
) -> None:  # fmt: skip
    path = request.getfixturevalue(family)
    source = open_checkpoint(quantised(path, scheme) if scheme else path)
    file = tmp_path / "model.onnx"
    export_onnx(source, file, lowering, **knobs)  # type: ignore[arg-type]
    found, whole = streamed(file, source), verify(file, source, PROMPTS, decoded=8)
    assert found.holds and whole.holds, found
    assert found.positions == 5 + 19 + 24
    assert found.worst < 1e-5, "no step of these models is near a tie"
    assert found.agreed == found.decoded > 40
    assert (found.rounded_kl is None) == (whole.rounded_kl is None)
    if found.rounded_kl and whole.rounded_kl:
        assert 0.5 < found.rounded_kl / whole.rounded_kl < 2
        assert 0.5 < (found.expected_kl or 0) / (whole.expected_kl or 1) < 2
    assert "block by block" in str(found)


def changed(file: Path, name: str, factor: float) -> None:
    """Multiply a tensor of the file."""
    model = onnx.load(str(file))
    (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), name))
    onnx.save(model, str(file), save_as_external_data=True, location="changed.data", size_threshold=256)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.1.self_attn.o_proj.weight", "model.layers.1"),
        ("lm_head.weight", "the head"),
        ("model.embed_tokens.weight", "the embedding"),
    ],
)
def test_a_wrong_file_is_found_and_the_place_named(tmp_path: Path, tiny_llama: Path, name: str, place: str) -> None:
    source, file = open_checkpoint(tiny_llama), tmp_path / "model.onnx"
    export_onnx(source, file, dtype="float32")
    changed(file, name, 1.05)
    found = streamed(file, source)
    assert not found.holds
    assert str(found.differs).startswith(place)


def test_a_part_takes_what_its_own_weights_take(tmp_path: Path, tiny_v3: Path) -> None:
    """Block by block is worth it: no part has what the others have."""
    source, file = open_checkpoint(tiny_v3), tmp_path / "model.onnx"
    export_onnx(source, file)
    parts = Parts(onnx.load(str(file), load_external_data=False), tmp_path, "float32")
    names = [{t.name for t in parts.cut(hidden_name(n + 1), hidden_name(n)).graph.initializer} for n in range(2)]
    assert any(name.startswith("model.layers.0.") for name in names[0])
    assert not any(name.startswith("model.layers.0.") or "embed" in name for name in names[1])
    largest = max(parts.memory(hidden_name(n + 1), hidden_name(n)) for n in range(source.config["num_hidden_layers"]))
    ends = (parts.memory(hidden_name(0), None), parts.memory("logits", hidden_name(source.config["num_hidden_layers"])))
    assert memory(file, source, "float32") == max(largest, *ends)


def test_the_memory_decides_how_an_export_is_checked(tmp_path: Path, tiny_v2: Path, quantised: Quantise) -> None:
    source = open_checkpoint(quantised(tiny_v2, "w4a8"))

    def run(memory: int, verify: bool | None = None) -> tuple[dict[str, Any], list[str]]:
        told: list[str] = []
        context = Context("export", tmp_path / "out", "", 0, memory=memory, tell=told.append)
        stage = Export.model_validate({"target": "onnxruntime", "verify": verify})
        return dict(stage.run(source, context).facts), told

    facts, told = run(1_000_000_000)
    assert facts["verification"]["streamed"] and facts["verification"]["holds"]
    assert any("block by block" in line for line in told)
    assert not any(file.is_dir() for file in (tmp_path / "out").iterdir())
    facts, told = run(1000)
    assert "verification" not in facts and facts["status"] == "written, not run"
    assert any(line.startswith("not compared with the runtime: comparing a block") for line in told)
    with pytest.raises(DscError, match="give more --memory"):
        run(1000, True)
    assert not list((tmp_path / "out").rglob("model.onnx"))


def test_a_head_that_is_rounded_at_load_comes_in_pieces(
    tmp_path: Path, tiny_llama: Path, quantised: Quantise, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of its table would be there in FP32 several times; the pieces give the same logits, bit for bit."""
    source = open_checkpoint(quantised(tiny_llama, "w4a16"))
    file, last = tmp_path / "model.onnx", hidden_name(source.config["num_hidden_layers"])
    export_onnx(source, file, "matmulnbits")
    parts = Parts(onnx.load(str(file), load_external_data=False), tmp_path, "float32")
    rows = np.random.default_rng(0).standard_normal((3, 1, source.config["hidden_size"])).astype(np.float32)
    ones = np.ones((3, 1), np.int64)

    def logits() -> list[Any]:
        return [part(ones, ones, rows, [slice(0, 1)]) for part in parts.open_head(last)]

    (whole,), all_of_it = logits(), parts.head_memory(last)
    monkeypatch.setattr(cutting, "AT_ONCE", 100 * source.config["hidden_size"])
    pieces = logits()
    assert [piece.shape[-1] for piece in pieces] == [100] * 5 + [12]
    assert np.array_equal(np.concatenate(pieces, -1), whole)
    assert parts.head_memory(last) * 5 < all_of_it < parts.head_memory(last) * 6
    export_onnx(source, file, "matmulnbits", accuracy_level=0)
    parts = Parts(onnx.load(str(file), load_external_data=False), tmp_path, "float32")
    assert len(logits()) == 1, "codes that are stored, or none, need no pieces"

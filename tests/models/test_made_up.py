"""A family is one file of facts: one that nobody knows is quantised, evaluated and exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.evaluation import streamed
from deepseek_compress.evaluation.about import about
from deepseek_compress.evaluation.divergence import Sample
from deepseek_compress.export.onnx import export_onnx
from deepseek_compress.export.verify import OnnxModel
from deepseek_compress.models.families import table
from deepseek_compress.models.runtime import Model
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from tests.conftest import finish_directory, write_shards
from tests.models import made_up

CONFIG = {
    "model_type": "made_up", "architectures": ["MadeUp"], "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip
TOKENS = torch.randint(3, 500, (3, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(table.FAMILIES, "made_up", made_up.MadeUp)
    family = made_up.MadeUp()
    draw, out = torch.Generator().manual_seed(0), tmp_path / "made-up"
    out.mkdir()
    shapes = family.tensors(family.parse(CONFIG))
    state = {
        name: (torch.randn(shape, generator=draw) * (shape[-1] ** -0.5 if len(shape) > 1 else 0.2)
               + (1 if len(shape) == 1 and "bias" not in name else 0)).bfloat16()
        for name, shape in shapes.items()
    }  # fmt: skip
    write_shards(out, state, shards=2)
    return finish_directory(out, CONFIG)


def test_the_file_is_small() -> None:
    assert len(Path(made_up.__file__).read_text().splitlines()) <= 30


@torch.no_grad()
def test_it_is_quantised_evaluated_and_exported(model: Path, text: Path, tmp_path: Path) -> None:
    knobs = {"weights": {"gptq": {"group_size": 32}}, "migration": "smoothquant", "rotation": "hadamard"}
    calibration = {"sources": [str(text)], "samples": 6, "length": 48}
    context = Context("out", tmp_path / "out", "", 0, calibration, tell=lambda line: None)
    out = build(Compress, knobs, "compress").run(open_checkpoint(model), context).path
    done = open_checkpoint(out)
    packed = [name for name, info in done.header.tensors.items() if info.encoding == "packed"]
    assert len(packed) == 2 * 7
    assert about(done) == "4-bit asymmetric, groups of 32"
    samples = [Sample(row, 1) for row in TOKENS.tolist()]
    subjects = {"a": streamed.Subject(open_checkpoint(model)), "b": streamed.Subject(done)}
    found = streamed.measure(subjects, samples, tmp_path / "work", streamed.NO_LIMITS, lambda *_: None)
    assert 0 < (found["b"].kl_divergence or 0) < 0.2
    export_onnx(done, tmp_path / "model.onnx")
    graph, runtime = OnnxModel(tmp_path / "model.onnx"), Model.load(done)
    for row in TOKENS:
        graph.start(1)
        logits = torch.from_numpy(graph.step(row[None].numpy()))
        torch.testing.assert_close(logits, runtime.forward(row[None]), rtol=1e-3, atol=1e-3)


def test_tensors_come_back(model: Path, tmp_path: Path) -> None:
    source = open_checkpoint(model)
    with CheckpointWriter(tmp_path / "copy", source) as writer:
        for name in source.header.tensors:
            writer.copy(name)
        writer.finish({}, {}, [])
    assert torch.equal(Model.load(tmp_path / "copy").forward(TOKENS), Model.load(model).forward(TOKENS))

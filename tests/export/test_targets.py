"""Each target of `dsc export` as the stage runs it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from pydantic import ValidationError

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.export import TARGETS, load
from deepseek_compress.generation.backends.onnx import open_session
from deepseek_compress.models.runtime import Model
from deepseek_compress.stages.base import Context, Output
from deepseek_compress.stages.export import Export

from .conftest import Quantise


def run(source: Path, out: Path, told: list[str] | None = None, **knobs: Any) -> Output:
    tell = (told if told is not None else []).append
    context = Context(name="export", out=out, recipe_text="", seed=0, tell=tell)
    stage = Export.model_validate(knobs)
    checkpoint = open_checkpoint(source)
    assert not stage.problems(checkpoint.header)
    return stage.run(checkpoint, context)


@pytest.mark.parametrize("name", TARGETS)
def test_each_target_is_what_the_table_says(name: str) -> None:
    target = load(name)
    assert target.name == name
    assert target.__doc__
    assert Export.model_validate({"target": name}).model_dump() == {"target": name, **target().model_dump(mode="json")}


def test_a_target_has_its_own_knobs() -> None:
    level = {"target": "onnxruntime", "accuracy_level": 0}
    assert Export.model_validate(level) == Export.model_validate({"target": {"onnxruntime": {"accuracy_level": 0}}})
    with pytest.raises(DscError, match=r"target bf16: unknown knob 'accuracy_level'; valid knobs: none"):
        Export.model_validate({"target": "bf16", "accuracy_level": 0})


@pytest.mark.parametrize("target", ["onnx", "onnxruntime"])
def test_graph_targets(tmp_path: Path, tiny_v3: Path, quantised: Quantise, target: str) -> None:
    told: list[str] = []
    output = run(quantised(tiny_v3, "w4a16"), tmp_path, told, target=target)
    assert (output.kind, output.path) == ("artifact", tmp_path / "model.onnx")
    facts = output.facts
    assert facts["status"] == "ran in onnxruntime"
    assert facts["verification"]["holds"]
    caches = [value for value in open_session(output.path).get_outputs() if value.name.startswith("present.")]
    widths = [4 * math.prod(size for size in value.shape[1:] if isinstance(size, int)) for value in caches]
    assert facts["cache_bytes_per_token"] == sum(widths)
    assert facts["bytes"] == sum((tmp_path / name).stat().st_size for name in ("model.onnx", "model.onnx.data"))
    domains = {node.domain for node in onnx.load(str(output.path), load_external_data=False).graph.node}
    assert ("com.microsoft" in domains) == (target == "onnxruntime")
    assert json.loads((tmp_path / "dsc_manifest.json").read_text())["knobs"]["target"] == target
    assert any("clear tokens equal" in line for line in told)
    for name in ("config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (quantised(tiny_v3, "w4a16") / name).read_bytes()


def test_a_graph_that_disagrees_leaves_nothing_that_loads(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = Model.load

    def other(source: Any, device: str) -> Model:
        model = load(source, device=device)
        return Model(model.family, model.cfg, {n: t * 1.05 for n, t in model.weights.items()})

    run(tiny_llama, tmp_path, verify=False)
    assert (tmp_path / "model.onnx").is_file()
    monkeypatch.setattr(Model, "load", other)
    with pytest.raises(DscError, match="differs from the runtime, most in "):
        run(tiny_llama, tmp_path)
    assert not list(tmp_path.rglob("model.onnx"))


@pytest.mark.parametrize("family", ["tiny_v3", "tiny_llama"])
def test_bf16_of_a_packed_checkpoint(
    tmp_path: Path, request: pytest.FixtureRequest, quantised: Quantise, family: str
) -> None:
    source = quantised(request.getfixturevalue(family), "w4a16")
    output = run(source, tmp_path, target="bf16")
    assert output.kind == "checkpoint"
    before, after = open_checkpoint(source), open_checkpoint(tmp_path)
    assert "quantization_config" not in after.config
    assert set(before.header.tensors) == set(after.header.tensors)
    for name, info in after.header.tensors.items():
        assert info.encoding == "plain"
        assert torch.equal(after.read(name), before.read(name).bfloat16().float()), name
    assert Model.load(after)  # every tensor of the family is there


def test_bf16_of_the_published_form(tmp_path: Path, tiny_v3: Path, tiny_v3_bf16: Path) -> None:
    run(tiny_v3, tmp_path, target="bf16")
    have, want = open_checkpoint(tmp_path), open_checkpoint(tiny_v3_bf16)
    assert all(torch.equal(have.read(n, None), want.read(n, None)) for n in want.header.tensors)
    assert have.config["topk_method"] == "noaux_tc"


def test_compressed_tensors_is_passed_on_bit_for_bit(tmp_path: Path, tiny_qwen2: Path, quantised: Quantise) -> None:
    source = quantised(tiny_qwen2, "w4a8")
    output = run(source, tmp_path, target="compressed-tensors")
    before, after = open_checkpoint(source), open_checkpoint(tmp_path)
    assert output.facts["packed_tensors"] == 14
    assert after.config == before.config
    assert after.activations == before.activations
    for name in before.header.tensors:
        have, want = after.read_raw(name), before.read_raw(name)
        assert set(have) == set(want)
        assert all(torch.equal(have[part], want[part]) for part in want)


def test_compressed_tensors_of_a_plain_checkpoint(tiny_qwen2: Path) -> None:
    (problem,) = Export.model_validate({"target": "compressed-tensors"}).problems(open_checkpoint(tiny_qwen2).header)
    assert "dsc quantize" in problem.fix


def test_a_genai_folder(tmp_path: Path, tiny_qwen2: Path, tiny_v2: Path, quantised: Quantise) -> None:
    """The names that its configuration gives are those of the graph; `test_genai` opens it with the real package."""
    output = run(quantised(tiny_qwen2, "w4a16"), tmp_path, target="genai")
    config = json.loads(output.path.read_text())
    decoder = config["model"]["decoder"]
    session = open_session(tmp_path / decoder["filename"])
    inputs, outputs = decoder["inputs"], decoder["outputs"]
    names = [inputs[key] for key in ("input_ids", "attention_mask", "position_ids")]
    layers = range(decoder["num_hidden_layers"])
    names += [inputs[f"past_{part}_names"] % layer for layer in layers for part in ("key", "value")]
    assert sorted(names) == sorted(value.name for value in session.get_inputs())
    names = [outputs[f"present_{part}_names"] % layer for layer in layers for part in ("key", "value")]
    assert sorted([outputs["logits"], *names]) == sorted(value.name for value in session.get_outputs())
    cache = session.get_inputs()[3].shape
    assert (cache[1], cache[3]) == (decoder["num_key_value_heads"], decoder["head_size"])
    assert config["model"]["eos_token_id"] == 2
    assert config["model"]["context_length"] == 256
    (problem,) = Export.model_validate({"target": "genai"}).problems(open_checkpoint(tiny_v2).header)
    assert "latents" in problem.what


def test_padding_only_gives_numbers(tmp_path: Path, tiny_v2: Path) -> None:
    """As a server's warm-up, which sends zeros everywhere."""
    output = run(tiny_v2, tmp_path, verify=False)
    session = open_session(output.path)
    feed = {
        value.name: np.zeros(
            [2, *(3 if isinstance(size, str) else size for size in value.shape[1:])],
            np.int64 if value.type == "tensor(int64)" else np.float32,
        )
        for value in session.get_inputs()
    }
    feed["attention_mask"] = np.zeros((2, 6), np.int64)
    assert np.isfinite(session.run(["logits"], feed)[0]).all()


def test_wrong_knobs_and_models_are_told_before_the_run(tiny_v3: Path) -> None:
    with pytest.raises((DscError, ValidationError), match="unknown target"):
        Export.model_validate({"target": "tensorflow"})
    header = open_checkpoint(tiny_v3).header
    assert (
        "sm75"
        in Export.model_validate({"target": "tensorrt-rtx", "compute_capabilities": ["sm75"]}).problems(header)[0].what
    )
    assert (
        "range of past" in Export.model_validate({"target": "tensorrt-rtx", "past": (9, 1, 2)}).problems(header)[0].what
    )


def test_an_engine_of_another_tensorrt_rtx_is_kept_its_plan_not_read(tmp_path: Path) -> None:
    from deepseek_compress.export.targets.tensorrt import TensorRtRtx

    (tmp_path / "model.engine").write_bytes(b"another format")
    (tmp_path / "model.onnx").write_bytes(onnx.ModelProto(ir_version=10).SerializeToString())
    found = TensorRtRtx().plan(tmp_path, "1.8.0.21")
    assert found == {"plan": None, "plan_not_read": "TensorRT-RTX 1.8.0.21: plans are read of 1.7.1 alone"}
    with pytest.raises(DscError, match="no plan text that is understood"):
        TensorRtRtx().plan(tmp_path, "1.7.1.116")

"""The whole graph against the runtime: every family, prefill and decode with a padded batch, nothing left out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.export.onnx import export_onnx
from deepseek_compress.export.pieces import row_softmax
from deepseek_compress.export.verify import OnnxModel, random_prompts, verify
from deepseek_compress.generation.backends.onnx import open_session
from deepseek_compress.models.families.table import family_of
from deepseek_compress.models.runtime import Model

from .conftest import Quantise

FAMILIES = ("tiny_v3", "tiny_v2", "tiny_qwen2", "tiny_qwen3", "tiny_llama")
PROMPTS = random_prompts(512, (5, 19, 24))


@pytest.mark.parametrize("lowering", ["plain", "matmulnbits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_equals_the_runtime(tmp_path: Path, request: pytest.FixtureRequest, family: str, lowering: str) -> None:
    source = open_checkpoint(request.getfixturevalue(family))
    export_onnx(source, tmp_path / "model.onnx", lowering)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    found = verify(tmp_path / "model.onnx", source, PROMPTS)
    assert found.worst < 1e-5  # no step of these models is near a tie
    assert found.kl < 1e-3 * found.bound
    assert found.rounded_kl is None
    assert found.agreed == found.decoded > 80


@pytest.mark.parametrize("lowering", ["plain", "standard", "tensorrt", "matmulnbits"])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8", "w8a8"])
@pytest.mark.parametrize("family", ["tiny_v3", "tiny_qwen2"])
def test_quantised_equals_the_runtime(
    tmp_path: Path, request: pytest.FixtureRequest, quantised: Quantise, family: str, scheme: str, lowering: str
) -> None:
    source = open_checkpoint(quantised(request.getfixturevalue(family), scheme))
    export_onnx(source, tmp_path / "model.onnx", lowering, accuracy_level=0)
    found = verify(tmp_path / "model.onnx", source, PROMPTS, decoded=8)
    assert found.holds, found
    assert found.worst < 1e-5, "without its rounding of activations"
    assert (found.rounded_kl is None) == (scheme == "w4a16")


@pytest.mark.parametrize("lowering", ["standard", "tensorrt", "matmulnbits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_8_bit_attention_equals_the_runtime(
    tmp_path: Path, request: pytest.FixtureRequest, quantised: Quantise, family: str, lowering: str
) -> None:
    """TensorRT has signed integers alone: 127 shares there, 255 in the runtime."""
    source = open_checkpoint(quantised(request.getfixturevalue(family), "w4a8-attention"))
    export_onnx(source, tmp_path / "model.onnx", lowering, accuracy_level=0)
    found = verify(tmp_path / "model.onnx", source, PROMPTS, decoded=8)
    assert found.holds, found
    assert found.worst < 1e-5
    without = Model.load(source)
    without.int8 = False
    other = verify(tmp_path / "model.onnx", source, PROMPTS, model=without, decoded=8)
    assert other.expected_kl != found.expected_kl
    kinds = [node.op_type for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]
    assert kinds.count("QuantizeLinear") >= 4 * without.cfg.num_hidden_layers


@pytest.mark.parametrize("scheme", ["w4a16", "w4a8"])
def test_float16_keeps_its_bound(tmp_path: Path, tiny_v3: Path, quantised: Quantise, scheme: str) -> None:
    source = open_checkpoint(quantised(tiny_v3, scheme))
    export_onnx(source, tmp_path / "model.onnx", "tensorrt", dtype="float16")
    found = verify(tmp_path / "model.onnx", source, PROMPTS, dtype="float16")
    assert found.holds, found


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_the_checkpoint_is_there_by_name(
    tmp_path: Path, request: pytest.FixtureRequest, family: str
) -> None:
    source = open_checkpoint(request.getfixturevalue(family))
    cfg = family_of(source.config).parse(source.config)
    export_onnx(source, tmp_path / "model.onnx", "plain", dtype="float16")
    tensors = {t.name: t for t in onnx.load(str(tmp_path / "model.onnx")).graph.initializer}
    for name in source.header.tensors:
        if ".experts." in name:
            stem, rest = name.split(".experts.")
            expert, part = rest.split(".", 1)
            value = numpy_helper.to_array(tensors[f"{stem}.experts.*.{part}"])
            assert value.shape[0] == cfg.moe.experts  # type: ignore[union-attr]
            value = value[int(expert)].T
        else:
            value = numpy_helper.to_array(tensors[name])
        want = source.read(name).numpy().astype(value.dtype)
        assert np.array_equal(value, want), name


def test_a_prefix_may_come_in_pieces(tmp_path: Path, tiny_v3: Path) -> None:
    source = open_checkpoint(tiny_v3)
    export_onnx(source, tmp_path / "model.onnx")
    model = OnnxModel(tmp_path / "model.onnx")
    tokens = np.array(random_prompts(512, [12] * 2), np.int64)
    model.start(2)
    whole = model.step(tokens)
    model.start(2)
    pieces = [model.step(tokens[:, a:b]) for a, b in ((0, 5), (5, 6), (6, 12))]
    assert np.abs(np.concatenate(pieces, axis=1) - whole).max() < 1e-5 * np.abs(whole).max()


def test_a_tied_head_is_stored_once(tmp_path: Path, tiny_qwen2: Path) -> None:
    source = open_checkpoint(tiny_qwen2)
    facts = export_onnx(source, tmp_path / "model.onnx")
    stored = sum(f.stat().st_size for f in tiny_qwen2.glob("*.safetensors"))
    assert facts["bytes"] < 1.1 * stored  # a BF16 checkpoint's weights stay 16-bit in an FP32 graph


@pytest.mark.parametrize("family", ["tiny_qwen2", "tiny_qwen3", "tiny_llama"])
def test_an_8_bit_embedding(tmp_path: Path, request: pytest.FixtureRequest, quantised: Quantise, family: str) -> None:
    source = open_checkpoint(quantised(request.getfixturevalue(family), "w4a16"))
    path = tmp_path / "model.onnx"
    small = export_onnx(source, path, "matmulnbits", embedding_bits=8, accuracy_level=0)["bytes"]
    found = verify(path, source, PROMPTS, decoded=8)
    assert found.worst < 1e-5, "the runtime has the same 8-bit tables"
    assert found.rounded_kl is None
    assert small < export_onnx(source, tmp_path / "large.onnx", "matmulnbits")["bytes"]


@pytest.mark.parametrize("family", ["tiny_qwen2", "tiny_qwen3", "tiny_llama"])
def test_the_head_at_level_4_is_rounded_at_load(
    tmp_path: Path, request: pytest.FixtureRequest, quantised: Quantise, family: str
) -> None:
    """onnxruntime folds codes and scales into constants; the file keeps the 16-bit table, once."""
    source = open_checkpoint(quantised(request.getfixturevalue(family), "w4a16"))
    files = [tmp_path / name for name in ("level4.onnx", "level0.onnx")]
    levels = zip(files, (4, 0), strict=True)
    sizes = [export_onnx(source, file, "matmulnbits", accuracy_level=level)["bytes"] for file, level in levels]
    assert sizes[0] < sizes[1] + 5000  # nodes, no tensor
    found = verify(files[0], source, PROMPTS, decoded=8)
    assert found.holds, found
    assert found.worst < 1e-5, "at level 0, beside a runtime with the same 8-bit head"
    assert (found.rounded_kl or 0) > 100 * found.kl
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    onnxruntime.InferenceSession(str(files[0]), options, providers=["CPUExecutionProvider"])
    folded = onnx.load(str(tmp_path / "folded.onnx"))
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in folded.graph.initializer}
    (node,) = (n for n in folded.graph.node if n.op_type == "MatMulNBits" and tensors[n.input[1]].shape[0] == 512)
    name = "model.embed_tokens" if family == "tiny_qwen2" else "lm_head"
    weight = source.read(f"{name}.weight").numpy().reshape(512, -1, 128)
    scale = np.abs(weight).max(-1, keepdims=True) / np.float32(127)
    assert np.array_equal(tensors[node.input[2]], scale[..., 0])
    assert np.array_equal(tensors[node.input[1]], np.rint(weight / scale).astype(int) + 128)


@pytest.mark.parametrize(
    ("name", "place"), [("model.layers.1.mlp.down_proj.weight", "model.layers.1"), ("lm_head.weight", "the head")]
)
def test_a_wrong_file_is_found_and_the_place_named(tmp_path: Path, tiny_llama: Path, name: str, place: str) -> None:
    source = open_checkpoint(tiny_llama)
    path = tmp_path / "model.onnx"
    export_onnx(source, path)
    model = Model.load(source)
    model = Model(model.family, model.cfg, {**model.weights, name: model.weights[name] * 1.05})
    found = verify(path, source, PROMPTS, model=model, decoded=2)
    assert not found.holds
    assert str(found.differs).startswith(place)


@pytest.mark.parametrize("wrong", [127.0, 12.0])
def test_a_wrong_rounding_is_found(tmp_path: Path, tiny_qwen2: Path, quantised: Quantise, wrong: float) -> None:
    """Steps ten times too large, or so small that nothing is rounded: the graph is exact, its rounding is not."""
    source = open_checkpoint(quantised(tiny_qwen2, "w4a8"))
    path = tmp_path / "model.onnx"
    export_onnx(source, path, "standard")
    model = onnx.load(str(path), load_external_data=False)
    tops = [
        t
        for t in model.graph.initializer
        if t.name.startswith("constant/float32[]") and numpy_helper.to_array(t) == 127
    ]
    assert tops
    value = np.array(12.0 if wrong == 12.0 else 127.0 * 1000, np.float32)
    for tensor in tops:
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    onnx.save(model, str(path))
    found = verify(path, source, PROMPTS, decoded=8)
    assert found.exact
    assert not found.holds
    assert found.differs


def test_softmax_node(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    function = row_softmax(TensorProto.FLOAT)
    node = helper.make_node(function.name, ["x", "mask"], ["y"], domain=function.domain)
    values = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["r", "c"])]
    values += [helper.make_tensor_value_info("mask", TensorProto.BOOL, ["r", "c"])]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["r", "c"])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(function.domain, 1)]
    graph = helper.make_graph([node], "g", values, [out])
    onnx.save(
        helper.make_model(graph, functions=[function], opset_imports=opsets, ir_version=10), str(tmp_path / "m.onnx")
    )
    generator = np.random.default_rng(0)
    x = (30 * generator.standard_normal((6, 50))).astype(np.float32)
    x[1] = -1e30
    mask = generator.random((6, 50)) < 0.5
    mask[2] = False
    have = open_session(tmp_path / "m.onnx").run(None, {"x": x, "mask": mask})[0]
    wide = np.where(mask, x.astype(np.float64), -np.inf)
    top = np.where(mask.any(1, keepdims=True), wide.max(1, keepdims=True), 0)
    raised = np.exp(wide - top)
    want = raised / np.maximum(raised.sum(1, keepdims=True), 1e-300)
    assert np.abs(have - want).max() < 1e-6
    assert not have[2].any()


def test_what_has_no_graph_is_said(tmp_path: Path, tiny_llama: Path) -> None:
    source = open_checkpoint(tiny_llama)
    with pytest.raises(DscError, match="unknown lowering"):
        export_onnx(source, tmp_path / "m.onnx", "magic")
    with pytest.raises(DscError, match="8 bits with plain"):
        export_onnx(source, tmp_path / "m.onnx", "plain", embedding_bits=8)
    assert not list(tmp_path.iterdir())

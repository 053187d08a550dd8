"""The checkpoint for TensorRT-Edge-LLM: its bytes, what is refused, and its exporter in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.export import Export

from .conftest import SCHEMES, write_quantised

PYTHON = Path(os.environ.get("DSC_EDGE_PYTHON", "no-such-python"))
STAGE = Export.model_validate({"target": "edge-llm"})
TEMPLATE = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"


@pytest.fixture
def packed(tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch) -> Checkpoint:
    """Symmetric, groups of 128, with a chat template."""
    monkeypatch.setitem(SCHEMES, "edge", ({"num_bits": 4, "group_size": 128, "symmetric": True}, None))
    folder = write_quantised(tiny_qwen2, tmp_path / "edge", "edge")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return open_checkpoint(folder)


def written(source: Checkpoint, out: Path) -> Path:
    STAGE.run(source, Context(name="export", out=out, recipe_text="", seed=0, tell=lambda line: None))
    return out


def test_nibbles_and_scales_are_ours(tmp_path: Path, packed: Checkpoint) -> None:
    out = written(packed, tmp_path / "out")
    stored = load_file(out / "model-00001.safetensors")
    for name, info in packed.header.tensors.items():
        quantised = packed.read_quantized(name)
        if quantised is None:
            assert torch.equal(stored[name], packed.read(name).half())
            continue
        scale = stored[name + "_scale"].float()
        pairs = stored[name].to(torch.int16)
        rows = torch.stack((pairs & 15, pairs >> 4), dim=1).reshape(info.shape)
        signed = torch.where(rows > 7, rows - 16, rows).float()  # two's complement
        assert scale.shape == (info.shape[0], info.shape[1] // 128)
        have = signed * scale.repeat_interleave(128, dim=1)
        torch.testing.assert_close(have, quantised.dequantize(), atol=1e-7, rtol=2**-10)
    quantization = json.loads((out / "hf_quant_config.json").read_text())["quantization"]
    assert (quantization["quant_algo"], quantization["group_size"]) == ("W4A16_AWQ", 128)
    assert quantization["exclude_modules"] == ["lm_head"]
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config and config["torch_dtype"] == "float16"
    assert (out / "chat_template.jinja").read_text() == TEMPLATE


def test_what_its_plugin_does_not_take_is_refused(
    tmp_path: Path, packed: Checkpoint, tiny_v2: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def only(source: Checkpoint) -> str:
        found = STAGE.problems(source.header)
        assert found
        return f"{found[0].what}; {found[0].fix}"

    assert not STAGE.problems(packed.header)
    assert "latent attention" in only(open_checkpoint(tiny_v2))
    assert "holds no packed weights; quantise with `-r w4a16-edge`" in only(open_checkpoint(tiny_qwen2))
    asymmetric = open_checkpoint(write_quantised(tiny_qwen2, tmp_path / "asymmetric", "w4a16"))
    assert "zero points" in only(asymmetric) and "w4a16-edge" in only(asymmetric)
    assert "8 bits" in only(open_checkpoint(write_quantised(tiny_qwen2, tmp_path / "w8", "w8a8")))
    monkeypatch.setitem(SCHEMES, "edge64", ({"num_bits": 4, "group_size": 64, "symmetric": True}, None))
    assert "groups of 64" in only(open_checkpoint(write_quantised(tiny_qwen2, tmp_path / "g64", "edge64")))
    (packed.path / "chat_template.jinja").unlink()
    assert "no chat template" in only(packed)


def test_a_failure_leaves_nothing_that_loads(
    tmp_path: Path, packed: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Checkpoint.read

    def huge(self: Checkpoint, name: str, *rest: object, **knobs: object) -> torch.Tensor:
        value = read(self, name, *rest, **knobs)  # type: ignore[arg-type]
        return value * 1e6 if "norm" in name else value

    monkeypatch.setattr(Checkpoint, "read", huge)
    with pytest.raises(DscError, match="too large for FP16"):
        written(packed, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.verify
@pytest.mark.skipif(not PYTHON.exists(), reason="DSC_EDGE_PYTHON names no environment with tensorrt-edgellm[export]")
def test_its_exporter_takes_it(tmp_path: Path, packed: Checkpoint) -> None:
    """The ONNX file has its 4-bit plugin once for each packed weight: none was skipped or taken for FP16."""
    folder = written(packed, tmp_path / "out")
    command = [PYTHON.with_name("tensorrt-edgellm-export"), folder, tmp_path / "onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    import onnx

    (file,) = (tmp_path / "onnx").rglob("model.onnx")
    nodes = [node.op_type for node in onnx.load(file, load_external_data=False).graph.node]
    packed_weights = sum(info.encoding == "packed" for info in packed.header.tensors.values())
    assert sum("Int4GroupwiseGemm" in kind for kind in nodes) == packed_weights

"""Calibrated outputs as other tools read them: the logits of transformers are ours.

Qwen2 and Llama load in transformers with its compressed-tensors code. DeepSeek outputs are unpacked tensor by tensor
with the compressed-tensors package first and loaded as a plain model, because transformers 5.23 drops the zero points
of experts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from deepseek_compress.models.runtime import Model
from deepseek_compress.pipeline import run
from deepseek_compress.recipe import read_recipe

TOKENS = torch.randint(2, 512, (2, 24), generator=torch.Generator().manual_seed(5))
RECIPE = """
calibration: {{sources: [builtin], samples: 8, length: 64}}
stages:
  - compress: {{weights: {{gptq: {{group_size: 32, symmetric: {symmetric}}}}}, attention_bits: {attention}}}
"""


def quantized(model: Path, out: Path, symmetric: bool = False, attention: str = "null") -> Path:
    recipe = out.with_suffix(".yaml")
    recipe.write_text(f"model: {model}\n" + RECIPE.format(symmetric=str(symmetric).lower(), attention=attention))
    run(read_recipe(recipe), out, flat=True)
    return out


def their_logits(path: Path) -> Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    with torch.no_grad():
        return model(TOKENS).logits  # type: ignore[no-any-return]


def check_same(theirs: Tensor, ours: Model) -> None:
    with torch.no_grad():
        found = ours.forward(TOKENS)
    torch.testing.assert_close(found, theirs, rtol=1e-4, atol=2e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["tiny_qwen2", "tiny_llama"])
def test_transformers_reads_it_packed(
    name: str, symmetric: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    packed = quantized(request.getfixturevalue(name), tmp_path / "out", symmetric)
    # transformers decodes asymmetric weights in BF16 and symmetric ones in float32; the forward is in float32 here
    ours = Model.load(packed, torch.float32 if symmetric else torch.bfloat16)
    weights = {name: weight.float() for name, weight in ours.weights.items()}
    check_same(their_logits(packed), Model(ours.family, ours.cfg, weights))


@pytest.mark.parametrize("symmetric", [False, True])
def test_transformers_reads_several_schemes_where_all_are_symmetric(
    symmetric: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    packed = quantized(tiny_llama, tmp_path / "out", symmetric, attention="8")
    told = "transformers 5.23 does not" in (packed / "README.md").read_text()
    if symmetric:
        check_same(their_logits(packed), Model.load(packed, torch.float32))
    else:
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            their_logits(packed)
    assert told == (not symmetric)


@pytest.mark.parametrize("name", ["tiny_v3", "tiny_v2"])
def test_transformers_reads_what_compressed_tensors_unpacks(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    packed = quantized(request.getfixturevalue(name), tmp_path / "out")
    assert unpack(packed, tmp_path / "plain") > 50
    check_same(their_logits(tmp_path / "plain"), Model.load(packed))


def unpack(packed: Path, out: Path) -> int:
    """Write a plain float32 model with the compressed-tensors package alone; gives how many weights were packed."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((packed / "config.json").read_text())
    (scheme,) = QuantizationConfig.model_validate(config.pop("quantization_config")).config_groups.values()
    stored: dict[str, Tensor] = {}
    for file in packed.glob("*.safetensors"):
        stored.update(load_file(file))
    modules = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    for module in modules:
        suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
        parts = {suffix: stored.pop(f"{module}.{suffix}") for suffix in suffixes}
        parts["weight_scale"] = parts["weight_scale"].float()
        stored[f"{module}.weight"] = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    out.mkdir()
    save_file({name: tensor.float() for name, tensor in stored.items()}, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(config))
    return len(modules)

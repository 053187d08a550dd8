"""What other tools read: transformers with compressed-tensors loads our packed output and computes the same."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.checkpoint.header import module_of, stored_name
from deepseek_compress.checkpoint.quantization_config import matches

TOKENS = torch.randint(2, 512, (2, 24), generator=torch.Generator().manual_seed(5))
Pack = Callable[..., Path]


def mixed(name: str) -> dict[str, Any] | None:
    """Three schemes and some linears left plain: the parts of a fused linear share one. Symmetric, because transformers
    5.23 reads zero points only where one scheme holds for all."""
    if "layers.0.mlp.down" in name:
        return None
    if "mlp" in name:
        return {"group_size": 64, "num_bits": 4, "symmetric": True}
    return {"group_size": 32, "num_bits": 8 if "o_proj" in name else 3, "symmetric": True}


def logits(path: Path) -> Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    with torch.no_grad():
        return model(TOKENS).logits.float()  # type: ignore[no-any-return]


def as_plain(path: Path, out: Path) -> Path:
    """Every tensor decoded to BF16: the model that the packed one stands for."""
    source = open_checkpoint(path)
    with CheckpointWriter(out, source) as writer:
        for name in source.header.tensors:
            writer.copy(name, decode=True)
        writer.finish({}, {}, [])
    return out


@pytest.mark.parametrize("scheme", [None, mixed], ids=["one scheme", "three schemes"])
@pytest.mark.parametrize("model", ["tiny_qwen2", "tiny_llama"])
def test_transformers_computes_the_logits_of_the_plain_twin(
    model: str, scheme: Any, pack: Pack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(model)
    packed = pack(source, scheme)
    theirs, ours = logits(packed), logits(as_plain(packed, tmp_path / "plain"))
    assert torch.equal(theirs, ours)
    likeness = torch.corrcoef(torch.stack((ours.flatten(), logits(source).flatten())))[0, 1]
    assert 0.7 < likeness < 0.9999  # the weights did change, and are weights still


@pytest.mark.parametrize("model", ["tiny_v3", "tiny_v2", "tiny_qwen2", "tiny_llama"])
def test_our_runtime_computes_what_transformers_does_with_the_unpacked_weights(
    model: str, pack: Pack, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """In float32 on both sides, so that the bound is that of sums in another order."""
    import transformers

    from deepseek_compress.models.runtime import Model

    packed = open_checkpoint(pack(request.getfixturevalue(model), lambda name: {"group_size": 32}))
    with CheckpointWriter(tmp_path / "plain", packed) as writer:
        for name in packed.header.tensors:
            writer.add(name, packed.read(name))
        writer.finish({}, {}, [])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(TOKENS).logits
        found = Model.load(packed).forward(TOKENS)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5 * float(expected.abs().max()))


def test_transformers_loads_int8_weights_with_dynamic_activations(tiny_llama: Path, pack: Pack, tmp_path: Path) -> None:
    def channel(name: str) -> dict[str, Any]:
        return {"group_size": 256 if "down_proj" in name else 128, "num_bits": 8, "symmetric": True}

    packed = pack(tiny_llama, channel, activations={"num_bits": 8, "granularity": "token"})
    group = json.loads((packed / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    assert group["format"] == "int-quantized"
    assert group["weights"]["strategy"] == "channel"
    assert group["input_activations"]["strategy"] == "token"
    theirs, ours = logits(packed), logits(as_plain(packed, tmp_path / "plain"))
    assert (theirs - ours).abs().mean() < 0.1  # theirs rounds activations to 8 bits too


def test_published_models_load_in_transformers(
    tiny_v3_bf16: Path, tiny_v2: Path, tiny_v3: Path, tmp_path: Path
) -> None:
    plain = as_plain(tiny_v3, tmp_path / "plain")
    assert torch.equal(logits(plain), logits(tiny_v3_bf16))
    assert bool(torch.isfinite(logits(tiny_v2)).all())


@pytest.mark.parametrize("num_bits", [4, 3])
def test_compressed_tensors_unpacks_every_tensor_of_v3_as_we_do(num_bits: int, tiny_v3: Path, pack: Pack) -> None:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    out = pack(tiny_v3, lambda name: {"group_size": 32, "num_bits": num_bits})
    checkpoint = open_checkpoint(out)
    config = QuantizationConfig.model_validate(checkpoint.config["quantization_config"])
    (scheme,) = config.config_groups.values()
    count = 0
    for name, info in checkpoint.header.tensors.items():
        module = module_of(name)[0]
        ignored = any(matches(module, pattern) for pattern in config.ignore)
        if info.encoding == "packed":
            assert not ignored, name
            parts = stored_parts(info.parts, name)
            theirs = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
            assert torch.equal(theirs, checkpoint.read(name, torch.bfloat16)), name
            count += 1
        elif len(info.shape) == 2:
            assert ignored, name
    assert count == 5 * 3 + 3 + 2 * (8 + 1) * 3


def stored_parts(parts: Any, name: str) -> dict[str, Tensor]:
    found = {}
    for suffix, place in parts.items():
        with safe_open(place.file, "pt") as file:
            found[suffix] = file.get_tensor(stored_name(name, suffix))
    return found


def test_experts_become_one_pattern_a_layer(tiny_v3: Path, pack: Pack) -> None:
    """The experts of one layer stay plain, as where too few tokens reached one of them."""
    out = pack(tiny_v3, lambda name: None if "layers.1.mlp.experts" in name else mixed(name))
    config = open_checkpoint(out).config["quantization_config"]
    names = [r"re:^model\.layers\.1\.mlp\.experts\.\d+\." + p + "$" for p in ("gate_proj", "up_proj", "down_proj")]
    assert set(names) <= set(config["ignore"])
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert "Linear" not in targets
    assert names[0].replace(".1", ".2") in targets
    packed = {module_of(n)[0] for n, info in open_checkpoint(out).header.tensors.items() if info.encoding == "packed"}
    for module in packed:
        assert sum(any(matches(module, t) for t in g["targets"]) for g in config["config_groups"].values()) == 1, module
        assert not any(matches(module, pattern) for pattern in config["ignore"])
    assert not any(re.search(r"experts\.\d", target) for target in targets)

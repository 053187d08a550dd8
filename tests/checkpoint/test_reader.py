"""Reading: every published encoding, by value against slow references."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.checkpoint.formats.fp8 import decode_fp8_block, encode_fp8_block
from deepseek_compress.checkpoint.formats.mxfp4 import decode_mxfp4, encode_mxfp4


def test_fp8_reads_as_the_bf16_twin(tiny_v3: Path, tiny_v3_bf16: Path) -> None:
    fp8, bf16 = open_checkpoint(tiny_v3), open_checkpoint(tiny_v3_bf16)
    assert set(fp8.header.tensors) == set(bf16.header.tensors)
    assert {info.encoding for info in fp8.header.tensors.values()} == {"plain", "fp8_block"}
    for name, info in fp8.header.tensors.items():
        twin = bf16.read(name, torch.bfloat16)
        assert info.shape == tuple(twin.shape)
        assert torch.equal(fp8.read(name, torch.bfloat16), twin), name


def test_a_scale_may_lie_in_another_shard(tiny_v3: Path) -> None:
    parts = open_checkpoint(tiny_v3).header.tensors["model.layers.1.self_attn.kv_b_proj.weight"].parts
    assert parts["weight"].file != parts["weight_scale_inv"].file


def test_plain_tensors_equal_what_safetensors_reads(tiny_v2: Path, tiny_qwen2: Path, tiny_llama: Path) -> None:
    for path in (tiny_v2, tiny_qwen2, tiny_llama):
        checkpoint = open_checkpoint(path)
        with safe_open(path / "model.safetensors", "pt") as file:
            assert set(file.keys()) == set(checkpoint.header.tensors)
            for name in file.keys():  # noqa: SIM118 - not a dict
                assert torch.equal(checkpoint.read(name, None), file.get_tensor(name))
                assert checkpoint.read(name).dtype == torch.float32


def test_v32_scales_are_powers_of_two_in_float32(tmp_path: Path) -> None:
    weight = torch.randn(200, 130, generator=torch.Generator().manual_seed(0))
    codes, scale = encode_fp8_block(weight, power_of_two=True)
    parts = {"model.layers.0.self_attn.indexer.wk.weight": codes}
    parts["model.layers.0.self_attn.indexer.wk.weight_scale_inv"] = scale
    config = {"quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [128, 128]}}
    checkpoint = saved(tmp_path, parts, config)
    read = checkpoint.read("model.layers.0.self_attn.indexer.wk.weight")
    assert torch.equal(read, decode_fp8_block(codes, scale))
    assert float((read - weight).abs().max()) < float(weight.abs().max()) / 16


def test_v4_experts_and_scales(tmp_path: Path) -> None:
    """V4's names: no `model.`, `.scale` beside `.weight`; experts are bytes of two FP4 values; types that are whole
    numbers, such as the hash routing's table, keep them."""
    generator = torch.Generator().manual_seed(0)
    experts = torch.randn(48, 64, generator=generator)
    codes, exponents = encode_mxfp4(experts)
    fp8, scale = encode_fp8_block(torch.randn(130, 64, generator=generator), power_of_two=True)
    tensors = {
        "layers.0.ffn.experts.0.w1.weight": codes.view(torch.int8),
        "layers.0.ffn.experts.0.w1.scale": exponents.view(torch.float8_e8m0fnu),
        "layers.0.attn.wq_a.weight": fp8,
        "layers.0.attn.wq_a.scale": scale.to(torch.float8_e8m0fnu),
        "layers.0.attn.wq_b.weight": fp8.clone(),
        "layers.0.attn.wq_b.scale": scale,
        "layers.0.ffn.gate.tid2eid": torch.randint(0, 256, (8, 6), generator=generator),
        "hc_head_base": torch.randn(4, generator=generator),
    }
    checkpoint = saved(tmp_path, tensors, {"expert_dtype": "fp4"})
    expert = checkpoint.header.tensors["layers.0.ffn.experts.0.w1.weight"]
    assert (expert.encoding, expert.shape, expert.elements) == ("mxfp4", (48, 64), 48 * 64)
    assert torch.equal(checkpoint.read(expert.name), decode_mxfp4(codes, exponents))
    for name in ("layers.0.attn.wq_a.weight", "layers.0.attn.wq_b.weight"):
        assert torch.equal(checkpoint.read(name), decode_fp8_block(fp8, scale))
    table = checkpoint.read("layers.0.ffn.gate.tid2eid")
    assert torch.equal(table, tensors["layers.0.ffn.gate.tid2eid"])
    assert torch.equal(checkpoint.read("hc_head_base"), tensors["hc_head_base"])
    assert len(checkpoint.header.tensors) == 5


def test_packed_weights_come_back_as_codes(tiny_llama: Path, pack: Callable[..., Path]) -> None:
    source = open_checkpoint(tiny_llama)
    packed = open_checkpoint(pack(tiny_llama))
    name = "model.layers.1.mlp.down_proj.weight"
    info = packed.header.tensors[name]
    assert (info.encoding, info.shape, info.dtype) == ("packed", (128, 256), torch.int32)
    quantized = packed.read_quantized(name)
    assert quantized is not None
    assert (quantized.num_bits, quantized.group_size, quantized.symmetric) == (4, 64, False)
    assert torch.equal(quantized.dequantize(), packed.read(name))
    step = quantized.scale.repeat_interleave(64, 1)
    assert bool(((packed.read(name) - source.read(name)).abs() <= step * 0.56).all())  # BF16 scales: a little over half
    assert packed.read_quantized("model.norm.weight") is None


def test_reads_are_fresh_and_have_the_type_asked_for(tiny_v3: Path) -> None:
    checkpoint = open_checkpoint(tiny_v3)
    for name in ("model.norm.weight", "model.layers.0.self_attn.o_proj.weight"):
        first = checkpoint.read(name, torch.bfloat16)
        first.zero_()
        assert checkpoint.read(name, torch.bfloat16).abs().sum() > 0
        assert [checkpoint.read(name, d).dtype for d in (torch.float32, torch.float16)] == [
            torch.float32,
            torch.float16,
        ]
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert checkpoint.read(bias, None).dtype == torch.float32


def test_a_checkpoint_can_be_sent_to_another_process(tiny_v3: Path) -> None:
    checkpoint = open_checkpoint(tiny_v3)
    assert checkpoint.manifest is None
    assert checkpoint.activations is None
    twin = pickle.loads(pickle.dumps(checkpoint))
    assert torch.equal(twin.read("lm_head.weight"), checkpoint.read("lm_head.weight"))


def saved(path: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> Checkpoint:
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(config))
    return open_checkpoint(path)

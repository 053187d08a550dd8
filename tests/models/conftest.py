"""Tiny checkpoints of the families that only the model tests need."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.checkpoint.formats.fp8 import encode_fp8_block
from deepseek_compress.checkpoint.formats.mxfp4 import encode_mxfp4
from tests.conftest import V3_CONFIG, YARN, finish_directory, published_state, shape_of, write_shards
from tests.models.reference import v4_name

V32_CONFIG: dict[str, Any] = {
    **V3_CONFIG,
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_topk": 24,  # fewer than the tests' tokens, so that the indexer decides
    "index_head_dim": 48,
    "index_n_heads": 4,
}
V4_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 512, "hidden_size": 128,
    "moe_intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 1,
    "head_dim": 64, "q_lora_rank": 96, "qk_rope_head_dim": 32, "num_experts_per_tok": 2, "n_routed_experts": 8,
    "n_shared_experts": 1, "scoring_func": "sqrtsoftplus", "norm_topk_prob": True, "routed_scaling_factor": 1.5,
    "max_position_embeddings": 256, "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "hidden_act": "silu",
    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8}, "num_hash_layers": 2,
    "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
                    "compressed_sparse_attention", "heavily_compressed_attention"],
    "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "swiglu_limit": 1.5, "sliding_window": 12, "o_groups": 2,
    "o_lora_rank": 32, "index_n_heads": 4, "index_head_dim": 48, "index_topk": 6, "num_nextn_predict_layers": 0,
    "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "expert_dtype": "fp4",
    "rope_scaling": {key: value for key, value in YARN.items() if not key.startswith("mscale")},
}  # fmt: skip


@pytest.fixture(scope="session")
def tiny_v32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3.2 in small, BF16."""
    return _v32(tmp_path_factory.mktemp("tiny_v32"), V32_CONFIG)


@pytest.fixture(scope="session")
def clear_v32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_v32` with so many index heads that no two scores are equal: ties are broken in other ways elsewhere."""
    return _v32(tmp_path_factory.mktemp("clear_v32"), {**V32_CONFIG, "index_n_heads": 16})


def _v32(out: Path, config: dict[str, Any]) -> Path:
    write_shards(out, published_state(config, seed=6), shards=1)
    return finish_directory(out, config)


V4_FP8 = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}  # fmt: skip
V4_FP8_LINEARS = re.compile(r"(wq_a|wq_b|wkv|wo_a|wo_b|[eh]_proj|shared_experts\.w[123])\.weight$")


@pytest.fixture(scope="session")
def tiny_v4_published(tiny_v4: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_v4` with the types of V4-Flash: attention and shared experts in FP8 with E8M0 scales, and an MTP block."""
    out = tmp_path_factory.mktemp("tiny_v4_published")
    config = {**V4_CONFIG, "num_nextn_predict_layers": 1, "quantization_config": V4_FP8}
    source, generator = open_checkpoint(tiny_v4), torch.Generator().manual_seed(9)
    state = {name: source.read(name, None) for name, info in source.header.tensors.items() if info.encoding == "plain"}
    experts = [name for name, info in source.header.tensors.items() if info.encoding == "mxfp4"]
    stored = {
        name.removesuffix("weight") + suffix: part for name in experts for suffix, part in source.read_raw(name).items()
    }
    for name, shape in shape_of(config).mtp.items():
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.1
        tensor = scale * torch.randn(shape, generator=generator) + ("norm" in name)
        if ".experts." in name:
            codes, factors = encode_mxfp4(tensor)
            stored |= _mxfp4_parts(name, codes, factors)
        else:
            state[name] = tensor if "hc_" in name or name.endswith(("bias", "attn_sink")) else tensor.bfloat16()
    for name, tensor in state.items():
        if V4_FP8_LINEARS.search(name) and "compressor" not in name:
            stored[name], factors = encode_fp8_block(tensor, power_of_two=True)
            stored[name.removesuffix("weight") + "scale"] = factors.to(torch.float8_e8m0fnu)
        else:
            stored[name] = tensor
    write_shards(out, stored, shards=2)
    return finish_directory(out, config)


def _mxfp4_parts(name: str, codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    return {name: codes.view(torch.int8), name.removesuffix("weight") + "scale": scale.view(torch.float8_e8m0fnu)}


@pytest.fixture(scope="session")
def tiny_v4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V4 in small, published names, experts in MXFP4."""
    return _v4(tmp_path_factory.mktemp("tiny_v4"), V4_CONFIG)


@pytest.fixture(scope="session")
def clear_v4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_v4` with so many index heads that no two scores are equal."""
    return _v4(tmp_path_factory.mktemp("clear_v4"), {**V4_CONFIG, "index_n_heads": 16})


def _v4(out: Path, config: dict[str, Any]) -> Path:
    generator = torch.Generator().manual_seed(8)
    stored: dict[str, Tensor] = {}
    for name, tensor in published_state(config, seed=8).items():
        published = v4_name(name)
        if published.endswith("tid2eid"):
            places = torch.rand(512, 8, generator=generator).topk(2).indices
            stored[published] = places
        elif ".experts." in published:
            stored |= _mxfp4_parts(published, *encode_mxfp4(tensor.float()))
        elif "hc_" in published or published.endswith(("ape", "attn_sink")):
            stored[published] = 0.3 * torch.randn(tensor.shape, generator=generator)  # float32, as published
        else:
            stored[published] = tensor
    write_shards(out, stored, shards=1)
    return finish_directory(out, config)

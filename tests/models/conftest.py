"""Tiny checkpoints of the families that only the model tests need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_compress.checkpoint.formats.mxfp4 import encode_mxfp4
from tests.conftest import V3_CONFIG, YARN, finish_directory, published_state, write_shards
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
    out = tmp_path_factory.mktemp("tiny_v32")
    write_shards(out, published_state(V32_CONFIG, seed=6), shards=1)
    return finish_directory(out, V32_CONFIG)


@pytest.fixture(scope="session")
def tiny_v4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V4 in small, published names, experts in MXFP4."""
    out = tmp_path_factory.mktemp("tiny_v4")
    generator = torch.Generator().manual_seed(8)
    stored: dict[str, Tensor] = {}
    for name, tensor in published_state(V4_CONFIG, seed=8).items():
        published = v4_name(name)
        if published.endswith("tid2eid"):
            places = torch.rand(512, 8, generator=generator).topk(2).indices
            stored[published] = places
        elif ".experts." in published:
            codes, scale = encode_mxfp4(tensor.float())
            stored[published] = codes.view(torch.int8)
            stored[published.removesuffix("weight") + "scale"] = scale.view(torch.float8_e8m0fnu)
        elif "hc_" in published or published.endswith(("ape", "attn_sink")):
            stored[published] = 0.3 * torch.randn(tensor.shape, generator=generator)  # float32, as published
        else:
            stored[published] = tensor
    write_shards(out, stored, shards=1)
    return finish_directory(out, V4_CONFIG)

"""Tiny DeepSeek-V4.1 checkpoints: every path of the model in six blocks, weights by a formula, any encoding.

The sizes and the formula are those for which golden logits are known; see `tests/models/test_v41_golden.py`.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import v41_layout
from deepseek_compress.checkpoint.formats.fp8 import encode_fp8_block
from deepseek_compress.checkpoint.formats.mxfp4 import encode_mxfp4
from tests.conftest import write_shards

TEXT: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 6,
    "num_attention_heads": 4, "head_dim": 64, "qk_rope_head_dim": 16, "q_lora_rank": 64, "o_groups": 2,
    "o_lora_rank": 64, "sliding_window": 16, "compress_ratios": [0, 2, 2, 1, 1, 1, 0], "kv_source_layer_ids": [1, 3],
    "index_source_layer_ids": [1, 3, 5], "candidate_source_layer_id": 3, "candidate_topk_blocks": 3,
    "candidate_block_size": 4, "index_topk": 8, "index_n_heads": 16, "index_head_dim": 64,
    "max_position_embeddings": 128,
    "rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_fast": 32, "beta_slow": 1,
                     "original_max_position_embeddings": 32},
    "n_routed_experts": 4, "num_experts_per_tok": 2, "swiglu_limit": 1.0, "engram_layer_ids": [0, 1],
    "engram_num_embeddings": [660, 864], "engram_vocab_size": 100, "engram_n_heads": 2, "engram_head_dim": 32,
    "engram_compressed_vocab_size": 256, "num_nextn_predict_layers": 1, "dspark_target_layer_ids": [3, 4, 5],
    "dspark_markov_rank": 32, "dspark_n_routed_experts": 2, "dspark_num_experts_per_tok": 1,
}  # fmt: skip
VISION = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2}


def config(block: int = 32, drafts: bool = False, vision: bool = False, **changes: Any) -> dict[str, Any]:
    """The tiny model's config.json; `changes` of `text_config`."""
    found = copy.deepcopy(v41_layout.CONFIG)
    found["text_config"] |= {**TEXT, **changes}
    found |= {"eos_token_id": 2, "image_token_id": None}
    if not drafts:
        found["text_config"]["num_nextn_predict_layers"] = 0
    if vision:
        found["vision_config"] |= VISION
    else:
        del found["vision_config"]
    found["quantization_config"]["weight_block_size"] = [block, block]
    return found


def values(given: Mapping[str, Any], seed: int = 12) -> dict[str, Tensor]:
    """Every logical tensor in float32, with the values that its storage holds exactly; names in ASCII order."""
    found = {}
    for k, (name, shape) in enumerate(sorted(v41_layout.logical(dict(given)).items())):
        spread, mean = v41_layout.spread(name, shape)
        value = torch.from_numpy(_uniform(math.prod(shape), k, seed) * (math.sqrt(12) * spread) + mean).float()
        if v41_layout.TABLE.search(name):
            value = value.to(torch.float8_e4m3fn).float()
        elif not v41_layout.FP32.search(name):
            value = value.bfloat16().float()
        found[name] = value.view(shape)
    return found


def _uniform(count: int, k: int, seed: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    x = (np.arange(1, count + 1, dtype=np.uint64) + np.uint64(1000003 * k + 7919 * seed)) & np.uint64(0xFFFFFFFF)
    x = (x * np.uint64(2654435761)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(15)
    x = (x * np.uint64(2246822519)) & np.uint64(0xFFFFFFFF)
    x ^= x >> np.uint64(13)
    return x.astype(np.float64) / 2**32 - 0.5


def write_plain(out: Path, given: dict[str, Any], seed: int = 12) -> Path:
    """The tiny model in BF16 and FP32, its Engram tables in FP8 with scales of one."""
    state: dict[str, Tensor] = {}
    for name, value in values(given, seed).items():
        if v41_layout.TABLE.search(name):
            state[name] = value.to(torch.float8_e4m3fn)
            ones = torch.full((value.shape[0], value.shape[1] // 32), 127, dtype=torch.uint8)
            state[name.removesuffix("weight") + "scale"] = ones.view(torch.float8_e8m0fnu)
        else:
            state[name] = value if v41_layout.FP32.search(name) else value.bfloat16()
    return written(out, given, state)


def write_published(out: Path, given: dict[str, Any], seed: int = 12) -> Path:
    """The tiny model as V4.1 is published: FP8 in blocks, experts in FP4, Engram tables in FP8."""
    return written(out, given, published(given, seed))


def published(given: dict[str, Any], seed: int = 12) -> dict[str, Tensor]:
    """Every stored tensor."""
    state: dict[str, Tensor] = {}
    block = given["quantization_config"]["weight_block_size"]
    for name, value in values(given, seed).items():
        scale = name.removesuffix("weight") + "scale"
        if v41_layout.FP4.search(name):
            codes, powers = encode_mxfp4(value)
            state |= {name: codes.view(torch.int8), scale: powers.view(torch.float8_e8m0fnu)}
        elif v41_layout.FP8.search(name) or v41_layout.TABLE.search(name):
            size = (1, 32) if v41_layout.TABLE.search(name) else tuple(block)
            codes, factors = encode_fp8_block(value, size, power_of_two=True)
            state |= {name: codes, scale: factors.to(torch.float8_e8m0fnu)}
        else:
            state[name] = value if v41_layout.FP32.search(name) else value.bfloat16()
    return state


def written(out: Path, given: dict[str, Any], state: dict[str, Tensor]) -> Path:
    """Stored tensors and a config.json in three shards."""
    out.mkdir(parents=True, exist_ok=True)
    write_shards(
        out, state, shards=3, last=("layers.1.attn.wq_a.scale",) if "layers.1.attn.wq_a.scale" in state else ()
    )
    (out / "config.json").write_text(json.dumps(given, indent=2) + "\n")
    return out


def write_paired_tokenizer(out: Path, size: int = 512) -> None:
    """A tokenizer whose ids 2k and 2k + 1 differ in case alone, so that each folds to id // 2."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"{'W' if index % 2 else 'w'}{index // 2}": index for index in range(size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(out / "tokenizer.json"))

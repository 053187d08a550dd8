"""How DeepSeek-V4.1 is stored: the published config.json and, for any sizes, the type of every tensor on disk.

FP8 in blocks of 32 x 32 with E8M0 scales, experts in FP4 with one for 32 columns, Engram tables in FP8 with one for 32
columns of a row, the rest in BF16 or FP32. Source: the headers of the published shards, of which there are 96,085
tensors and 510,286,023,000 bytes.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from deepseek_compress.checkpoint.header import DTYPE_NAMES
from deepseek_compress.models.families.table import family_of

Stored = tuple[torch.dtype, tuple[int, ...]]  # type and shape on disk
BLOCK = 32
CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV41ForCausalLM"], "model_type": "deepseek_v41", "dtype": "bfloat16", "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 2, "image_token_id": 129264, "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32],
                            "scale_fmt": "ue8m0", "expert_dtype": "fp4"},
    "text_config": {
        "model_type": "deepseek_v41_text", "vocab_size": 129280, "hidden_size": 5120, "num_hidden_layers": 40,
        "max_position_embeddings": 1048576, "rms_norm_eps": 1e-20, "hidden_act": "silu", "tie_word_embeddings": False,
        "num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 512, "qk_rope_head_dim": 64,
        "q_lora_rank": 1280, "o_groups": 8, "o_lora_rank": 1024, "sliding_window": 128, "attention_bias": False,
        "rope_theta": 10000, "compress_rope_theta": 160000,
        "rope_scaling": {"rope_type": "yarn", "factor": 16, "beta_fast": 32, "beta_slow": 1,
                         "original_max_position_embeddings": 65536},
        "compress_ratios": [0, 0, *[2] * 18, *[1] * 20, 0, 0, 0], "kv_source_layer_ids": [2, 8, 14, 20],
        "index_source_layer_ids": [2, 8, 14, 20, 24, 28, 32, 36], "index_n_heads": 32, "index_head_dim": 128,
        "index_topk": 512, "candidate_source_layer_id": 20, "candidate_topk_blocks": 2048, "candidate_block_size": 8,
        "n_routed_experts": 384, "n_shared_experts": 1, "num_experts_per_tok": 6, "moe_intermediate_size": 2304,
        "scoring_func": "sqrtsoftplus", "topk_method": "noaux_tc", "norm_topk_prob": True,
        "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
        "engram_layer_ids": [1, 14], "engram_num_embeddings": [384006168, 384016682], "engram_max_ngram_size": 4,
        "engram_vocab_size": 16000000, "engram_n_heads": 8, "engram_head_dim": 256, "engram_pad_token_id": 2,
        "engram_compressed_vocab_size": 99092, "num_nextn_predict_layers": 3, "dspark_block_size": 5,
        "dspark_noise_token_id": 128799, "dspark_target_layer_ids": [37, 38, 39], "dspark_markov_rank": 256,
        "dspark_n_routed_experts": 128, "dspark_num_experts_per_tok": 3,
    },
    "vision_config": {
        "model_type": "deepseek_v41_vision", "num_hidden_layers": 32, "hidden_size": 1024, "num_attention_heads": 16,
        "intermediate_size": 2816, "patch_size": 14, "rope_theta": 10000, "downsample_ratio": 3,
        "max_image_tokens": 1024, "min_pixels": 295936, "max_wh_ratio": None,
    },
}  # fmt: skip
GAINS = {
    "wq_a": 1.6, "wo_a": 1.6, "indexer.wk": 1.6, "indexer.wq_b": 1.6, "wq_b": 0.95, "compressor.wkv": 1.8,
    "engram.wkv": 1.5, "wkv": 1.8, "wgate": 1.8, "wo_b": 1.9, "gate": 2.9, "weights_proj": 2.9, "w1": 1.5, "w3": 1.5,
    "w2": 1.05, "hc_attn_fn": 1.5, "hc_ffn_fn": 1.5,
}  # fmt: skip
SPREAD = {  # name -> (standard deviation, mean); the first that matches
    r"^embed": (0.12, 0.0), r"attn_norm": (0.005, 0.2), r"ffn_norm": (0.02, 0.4),
    r"^norm": (0.1, 1.0), r"q_norm": (0.1, 0.97), r"kv_norm": (0.05, 0.4), r"compressor\.norm": (0.05, 0.6),
    r"k_norm": (0.05, 0.5), r"attn_sink": (1.0, 0.0), r"gate\.bias": (0.3, 0.0),
    r"hc_\w+_base": (0.5, 0.0), r"hc_\w+_scale": (0.2, 1.0), r"engram\.embed": (0.5, 0.0),
    r"engram\.._weight": (0.1, 1.0),
}  # fmt: skip
FP32 = re.compile(r"(hc_\w+|attn_sink|ffn\.gate\.bias(_vl)?)$")
FP4 = re.compile(r"\.experts\.\d+\.w[123]\.weight$")
FP8 = re.compile(
    r"\.(attn\.(wq_a|wq_b|wkv|wo_a|wo_b)|attn\.indexer\.wq_b|shared_experts\.w[123]|engram\.wkv|main_proj)\.weight$"
)
TABLE = re.compile(r"\.engram\.embed\.weight$")


def logical(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint with its shape."""
    family = family_of(config)
    return family.tensors(family.parse(config))


def stored(config: dict[str, Any]) -> dict[str, Stored]:
    """Every stored tensor, scales included."""
    block = config["quantization_config"]["weight_block_size"]
    return {name: how for weight, shape in logical(config).items() for name, how in parts(weight, shape, block)}


def parts(name: str, shape: tuple[int, ...], block: list[int]) -> Iterator[tuple[str, Stored]]:
    """How one logical tensor lies on disk."""
    scale = name.removesuffix("weight") + "scale"
    if FP4.search(name):
        yield name, (torch.int8, (shape[0], shape[1] // 2))
        yield scale, (torch.float8_e8m0fnu, (shape[0], shape[1] // BLOCK))
    elif TABLE.search(name) or FP8.search(name):
        height, width = (1, BLOCK) if TABLE.search(name) else block
        yield name, (torch.float8_e4m3fn, shape)
        yield scale, (torch.float8_e8m0fnu, (-(-shape[0] // height), -(-shape[1] // width)))
    else:
        yield name, (torch.float32 if FP32.search(name) else torch.bfloat16, shape)


def shard_of(name: str, layers: int) -> int:
    """Number of the published shard (from 1): images, embedding, a block each, head, drafts, then the Engram tables."""
    found = re.match(r"(layers|mtp)\.(\d+)\.(engram\.)?", name)
    if found is None:
        outside = {"vision": 1, "aligner": 1, "embed": 2, "image_start": 2, "image_newline": 2, "image_end": 2}
        return outside.get(name.split(".")[0], layers + 3)
    number = int(found[2])
    if found[1] == "mtp":
        return layers + 4 + number
    return layers + 7 + (number > 1) if found[3] else number + 3


def spread(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Standard deviation and mean of a tensor of logical `shape`, as trained ones have them or near."""
    for pattern, found in SPREAD.items():
        if re.search(pattern, name):
            return found
    module = name.removesuffix(".weight")
    gain = next((gain for suffix, gain in GAINS.items() if module.endswith("." + suffix)), 1.0)
    return gain / math.sqrt(shape[-1]), 0.0


def write_headers(out: Path, config: dict[str, Any]) -> Path:
    """A checkpoint of these sizes whose files have headers and lengths, and no bytes: disks store none of the zeros."""
    layers = config["text_config"]["num_hidden_layers"]
    shards: dict[int, dict[str, Stored]] = {}
    for name, how in stored(config).items():
        shards.setdefault(shard_of(name, layers), {})[name] = how
    weight_map = {}
    for number, tensors in sorted(shards.items()):
        file = f"model-{number:05d}-of-{max(shards):05d}.safetensors"
        write_header(out / file, tensors)
        weight_map.update(dict.fromkeys(tensors, file))
    index = {"metadata": {"total_size": size(stored(config))}, "weight_map": weight_map}
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return out


def size(tensors: dict[str, Stored]) -> int:
    """Bytes of stored tensors."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors.values())


def write_header(path: Path, tensors: dict[str, Stored]) -> None:
    """A file with this header, its length, and no bytes."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)

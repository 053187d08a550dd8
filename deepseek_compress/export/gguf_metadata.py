"""GGUF metadata of a model, and which models llama.cpp computes otherwise than we do.

llama3's frequencies are a tensor of divisors. Latent attention is described as attention with one head of keys, as wide
as latent and rotated key together. yarn of DeepSeek: llama.cpp multiplies the scores by (1 + m ln factor)^2 with m the
log multiplier, 0.1 mscale_all_dim, and takes mscale to be equal to mscale_all_dim. Source: llama.cpp,
conversion/base.py, conversion/deepseek.py, src/llama-context.cpp, src/models/deepseek2.cpp.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.errors import DscError
from deepseek_compress.export.gguf_blocks import PACKED
from deepseek_compress.export.graph import Array
from deepseek_compress.export.vocabulary import Vocabulary
from deepseek_compress.models.config import Mla, ModelConfig, Moe, Rope
from deepseek_compress.models.mla import LATENT_EPS
from deepseek_compress.models.rope import frequencies, yarn_mscale

ONNX = "export onnx or onnxruntime"
NO_QUERY_LATENT = (26, 27)  # blocks of a deepseek2 file in which llama.cpp does not look for a query latent


def check_model(cfg: ModelConfig) -> list[DscError]:
    """Return what llama.cpp has no form for."""
    wrong = list(_rope_problems(cfg)) if cfg.mla is None else _latent_problems(cfg, cfg.mla)
    return [DscError(f"{cfg.model_type}: {what} has no form in llama.cpp", ONNX) for what in wrong]


def _rope_problems(cfg: ModelConfig) -> list[str]:
    rope, found = cfg.rope, []
    if rope.kind == "llama3" and cfg.model_type != "llama":
        found.append("llama3 rotary scaling")
    plain = frequencies(rope)[1] == yarn_mscale(rope.factor, 1.0) and rope.truncate and not rope.mscale_all_dim
    if rope.kind == "yarn" and not plain:
        found.append("yarn with its own attention factor")
    return found


def _latent_problems(cfg: ModelConfig, mla: Mla) -> list[str]:
    wrong = {
        f"{cfg.rope.kind} rotary scaling": cfg.rope.kind not in ("default", "yarn"),
        "yarn with its own attention factor": cfg.rope.kind == "yarn" and not _published_yarn(cfg.rope),
        "rope_interleave: false": not cfg.rope.interleaved,
        f"rms_norm_eps {cfg.rms_norm_eps:g} (the latents' is {LATENT_EPS:g})": cfg.rms_norm_eps != LATENT_EPS,
        "a bias": cfg.qkv_bias or cfg.o_bias or cfg.mlp_bias,
        f"a query latent in {cfg.num_hidden_layers} blocks": cfg.num_hidden_layers in NO_QUERY_LATENT
        and mla.q_lora_rank is not None,
    }
    if cfg.moe is not None:
        wrong |= {
            f"moe_layer_freq {cfg.moe.layer_freq}": cfg.moe.layer_freq != 1,
            "group_limited_greedy routing": cfg.moe.method == "group_limited_greedy" and cfg.moe.groups > 1,
            "routed experts without shared ones": not cfg.moe.shared,
        }
    return [what for what, is_wrong in wrong.items() if is_wrong]


def _published_yarn(rope: Rope) -> bool:
    """yarn with cos and sin as they are and a factor for the scores, as DeepSeek publishes it."""
    plain = rope.factor <= 1 or (rope.mscale == rope.mscale_all_dim != 0)
    return plain and rope.truncate and frequencies(rope)[1] == 1.0


def divisors_of(cfg: ModelConfig) -> Array | None:
    """Return what llama.cpp divides the angle of each channel pair by, float32 (dim / 2,): llama3's scaling."""
    if cfg.rope.kind != "llama3":
        return None
    plain = 1.0 / cfg.rope.theta ** (torch.arange(0, cfg.rope.dim, 2, dtype=torch.float32) / cfg.rope.dim)
    divisors: Array = (plain / frequencies(cfg.rope)[0]).numpy()
    return divisors


def describe(writer: Any, source: Checkpoint, cfg: ModelConfig, words: Vocabulary, kinds: Mapping[str, int]) -> None:
    """Add sizes, rotary embedding and tokenizer to a `gguf.GGUFWriter`. `kinds`: how many tensors each type has."""
    import gguf

    packed = [kind for kind in PACKED if kind in kinds]
    most = max(packed, key=lambda kind: kinds[kind]) if packed else "BF16"
    writer.add_type("model")
    writer.add_name(source.path.resolve().name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{most}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(cfg.vocab_size)
    writer.add_context_length(cfg.max_position_embeddings)
    writer.add_embedding_length(cfg.hidden_size)
    writer.add_block_count(cfg.num_hidden_layers)
    writer.add_feed_forward_length(cfg.intermediate_size)
    writer.add_head_count(cfg.num_attention_heads)
    writer.add_layer_norm_rms_eps(cfg.rms_norm_eps)
    if cfg.mla is None:
        writer.add_head_count_kv(cfg.num_key_value_heads)
        writer.add_key_length(cfg.head_dim)
        writer.add_value_length(cfg.head_dim)
    else:
        _describe_latent(writer, cfg.mla)
        _describe_experts(writer, cfg, cfg.moe)
    _describe_rope(writer, cfg.rope)
    words.describe(writer)


def _describe_latent(writer: Any, mla: Mla) -> None:
    writer.add_head_count_kv(1)
    writer.add_key_length(mla.kv_lora_rank + mla.rope)
    writer.add_value_length(mla.kv_lora_rank)
    writer.add_key_length_mla(mla.nope + mla.rope)
    writer.add_value_length_mla(mla.value)
    writer.add_kv_lora_rank(mla.kv_lora_rank)
    writer.add_q_lora_rank(mla.q_lora_rank or 0)


def _describe_experts(writer: Any, cfg: ModelConfig, moe: Moe | None) -> None:
    import gguf

    writer.add_leading_dense_block_count(cfg.num_hidden_layers if moe is None else moe.first_dense)
    writer.add_expert_feed_forward_length(cfg.intermediate_size if moe is None else moe.intermediate)
    writer.add_expert_shared_count(0 if moe is None else moe.shared)
    if moe is None:
        return
    writer.add_expert_count(moe.experts)
    writer.add_expert_used_count(moe.top_k)
    writer.add_expert_weights_scale(moe.scaling)
    writer.add_expert_weights_norm(moe.normalize)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType[moe.scoring.upper()])
    if moe.method == "noaux_tc" and moe.groups > 1:
        writer.add_expert_group_count(moe.groups)
        writer.add_expert_group_used_count(moe.top_groups)


def _describe_rope(writer: Any, rope: Rope) -> None:
    import gguf

    writer.add_rope_dimension_count(rope.dim)
    writer.add_rope_freq_base(rope.theta)
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType[rope.kind.upper()])
        writer.add_rope_scaling_factor(rope.factor)
    if rope.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope.original_length)
        writer.add_rope_scaling_yarn_beta_fast(rope.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(rope.beta_slow)
        if rope.mscale_all_dim:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope.mscale_all_dim)

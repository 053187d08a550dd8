"""transformers' own models, loaded from the tiny checkpoints by hand, for comparison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.checkpoint import Checkpoint, open_checkpoint

# transformers' name -> the published one; the first that matches a part of the name
V4_NAMES = (
    ("model.embed_tokens.", "embed."), ("lm_head.", "head."), ("model.hc_head.hc_", "hc_head_"), ("model.", ""),
    ("self_attn.compressor.indexer.scorer.", "attn.indexer."),
    ("self_attn.compressor.indexer.q_b_proj", "attn.indexer.wq_b"),
    ("self_attn.compressor.indexer.", "attn.indexer.compressor."), ("self_attn.", "attn."),
    ("compressor.kv_proj", "compressor.wkv"), ("compressor.gate_proj", "compressor.wgate"),
    ("compressor.kv_norm", "compressor.norm"), ("position_bias", "ape"), ("sinks", "attn_sink"),
    ("q_a_proj", "wq_a"), ("q_b_proj", "wq_b"), ("q_a_norm", "q_norm"), ("attn.kv_proj", "attn.wkv"),
    ("o_a_proj", "wo_a"), ("o_b_proj", "wo_b"), ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"), ("attn_hc.", "hc_attn_"), ("ffn_hc.", "hc_ffn_"), ("mlp.", "ffn."),
    ("e_score_correction_bias", "bias"), ("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2"),
)  # fmt: skip


def v4_name(name: str) -> str:
    """The name under which DeepSeek publishes a tensor of transformers' model."""
    for ours, published in V4_NAMES:
        name = name.replace(ours, published)
    return name


def state_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor in float32, by its published name."""
    return {name: checkpoint.read(name) for name in checkpoint.header.tensors}


def transformers_model(path: Path, **changes: Any) -> torch.nn.Module:
    """The model of `path` in float32, its experts stacked as transformers 5 holds them."""
    import transformers

    checkpoint = open_checkpoint(path)
    config = {
        key: value for key, value in checkpoint.config.items() if key not in ("quantization_config", "torch_dtype")
    }
    auto = transformers.AutoConfig.for_model(**{**config, **changes})
    auto._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(auto, dtype=torch.float32).eval()
    state = state_of(checkpoint)
    for name, target in model.state_dict().items():
        target.copy_(published_value(name, state, checkpoint.config))
    return model


def published_value(name: str, state: dict[str, Tensor], config: dict[str, Any]) -> Tensor:
    """The value of a transformers tensor from the published ones."""
    if config.get("tie_word_embeddings") and name == "lm_head.weight":
        return state["model.embed_tokens.weight"]
    published = v4_name if config["model_type"] == "deepseek_v4" else str
    if not name.endswith((".experts.gate_up_proj", ".experts.down_proj")):
        return state[published(name)]
    stem, _, last = name.rpartition(".")
    parts = ["gate_proj", "up_proj"] if last == "gate_up_proj" else ["down_proj"]
    experts = range(config["n_routed_experts"])
    return torch.stack([torch.cat([state[published(f"{stem}.{e}.{part}.weight")] for part in parts]) for e in experts])


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference over the largest value."""
    return float((ours - theirs).abs().max() / theirs.abs().max())

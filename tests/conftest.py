"""Tiny checkpoints on disk, one a family, shared by all tests: fixed seeds, saved as their authors publish them.

The configurations are not the easy ones: yarn with mscale, grouped sigmoid routing with a bias, llama3 rope, q/k/v
biases that are not zero, one scale in another shard than its weight.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from torch import Tensor

from deepseek_compress.checkpoint import Header
from deepseek_compress.checkpoint.formats.fp8 import encode_fp8_block
from deepseek_compress.models import Architecture
from deepseek_compress.tasks import mixture, write_tokenizer

# No test of ours times anything, and none fails because the machine is busy.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")

VOCABULARY = 512
YARN = {
    "type": "yarn", "factor": 4, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
    "mscale": 1.0, "mscale_all_dim": 1.0,
}  # fmt: skip
V3_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 320, "moe_intermediate_size": 64,
    "num_hidden_layers": 3, "num_nextn_predict_layers": 0, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 8, "routed_scaling_factor": 2.5, "kv_lora_rank": 64,
    "q_lora_rank": 96, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_group": 4,
    "topk_group": 2, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "num_experts_per_tok": 2,
    "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": True, "ep_size": 1, "hidden_act": "silu",
    "max_position_embeddings": 256, "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "rope_theta": 10000, "rope_scaling": YARN,
    "attention_bias": False, "attention_dropout": 0.0,
}  # fmt: skip
V2_CONFIG: dict[str, Any] = {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "torch_dtype": "bfloat16",
    "vocab_size": VOCABULARY, "hidden_size": 128, "intermediate_size": 352, "moe_intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4, "n_shared_experts": 2,
    "n_routed_experts": 8, "routed_scaling_factor": 1.0, "kv_lora_rank": 64, "q_lora_rank": None,
    "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32, "n_group": 1, "topk_group": 1,
    "topk_method": "greedy", "scoring_func": "softmax", "num_experts_per_tok": 3, "first_k_dense_replace": 1,
    "moe_layer_freq": 1, "norm_topk_prob": False, "hidden_act": "silu", "max_position_embeddings": 256,
    "initializer_range": 0.02, "rms_norm_eps": 1e-6, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False, "rope_theta": 10000, "attention_bias": False, "attention_dropout": 0.0,
    "rope_scaling": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip
QWEN2_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "torch_dtype": "bfloat16", "vocab_size": VOCABULARY,
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 256, "initializer_range": 0.02,
    "rms_norm_eps": 1e-6, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
    "rope_theta": 1000000.0, "use_sliding_window": False, "max_window_layers": 2, "attention_dropout": 0.0,
}  # fmt: skip
QWEN3_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "torch_dtype": "bfloat16", "vocab_size": VOCABULARY,
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 256, "initializer_range": 0.02,
    "rms_norm_eps": 1e-6, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "rope_theta": 1000000.0, "use_sliding_window": False, "max_window_layers": 2, "attention_dropout": 0.0,
    "attention_bias": False, "head_dim": 64,
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
}  # fmt: skip
LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", "vocab_size": VOCABULARY,
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "hidden_act": "silu", "max_position_embeddings": 256, "initializer_range": 0.02,
    "rms_norm_eps": 1e-5, "use_cache": True, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
    "rope_theta": 500000.0, "attention_bias": False, "mlp_bias": False, "head_dim": 32,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                     "original_max_position_embeddings": 64},
}  # fmt: skip


def shape_of(config: dict[str, Any]) -> Architecture:
    """A model of which only the configuration is known."""
    return Architecture.of(Header(Path(), config, {}))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of the calibration split as JSON Lines."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [{"prompt": p.prompt, "completion": p.solution} for p in mixture(3, 60, split="calibration")]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture(scope="session")
def tiny_v3_bf16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 in BF16, with exactly the values of `tiny_v3`."""
    out = tmp_path_factory.mktemp("tiny_v3_bf16")
    write_shards(out, {name: decoded(parts) for name, parts in _v3_parts().items()}, shards=2)
    return finish_directory(out, V3_CONFIG)


@pytest.fixture(scope="session")
def tiny_v3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V3 as published: FP8 in blocks of 128 x 128, three shards, one scale in another shard."""
    out = tmp_path_factory.mktemp("tiny_v3")
    parts = _v3_parts()
    stored = {name.removesuffix("weight") + suffix if suffix else name: tensor
              for name, pieces in parts.items() for suffix, tensor in pieces.items()}  # fmt: skip
    apart = "model.layers.1.self_attn.kv_b_proj.weight_scale_inv"
    write_shards(out, stored, shards=3, last=(apart,))
    fp8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
    return finish_directory(out, {**V3_CONFIG, "quantization_config": fp8})


@pytest.fixture(scope="session")
def tiny_v2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSeek-V2-Lite in small: no q_lora, softmax scores, two shared experts, BF16."""
    return _plain(tmp_path_factory.mktemp("tiny_v2"), V2_CONFIG, seed=2)


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """R1-Distill-Qwen in small: q/k/v biases that are not zero, tied head, one file."""
    return _plain(tmp_path_factory.mktemp("tiny_qwen2"), QWEN2_CONFIG, seed=3)


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """R1-0528-Qwen3 in small: norms of q and k, heads wider than hidden_size / heads, yarn, own head, one file."""
    return _plain(tmp_path_factory.mktemp("tiny_qwen3"), QWEN3_CONFIG, seed=6)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """R1-Distill-Llama in small: llama3 rope scaling, own head, one file."""
    return _plain(tmp_path_factory.mktemp("tiny_llama"), LLAMA_CONFIG, seed=4)


def published_state(config: dict[str, Any], seed: int) -> dict[str, Tensor]:
    """A random model of transformers' own class in BF16, under the names that its authors publish."""
    import transformers

    torch.manual_seed(seed)
    auto = transformers.AutoConfig.for_model(**config)
    model = transformers.AutoModelForCausalLM.from_config(auto, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        for published, piece in _split_experts(name, tensor):
            state[published] = _spread(published, piece, generator, tied=config["tie_word_embeddings"])
    return state


def _split_experts(name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """transformers 5 holds the experts of a layer as two stacked tensors; on disk each expert has three."""
    stem, _, last = name.rpartition(".")
    if not stem.endswith(".mlp.experts"):
        return [(name, tensor)]
    pieces: list[tuple[str, Tensor]] = []
    for expert, weight in enumerate(tensor):
        if last == "gate_up_proj":
            gate, up = weight.chunk(2)
            pieces += [(f"{stem}.{expert}.gate_proj.weight", gate), (f"{stem}.{expert}.up_proj.weight", up)]
        else:
            pieces.append((f"{stem}.{expert}.down_proj.weight", weight))
    return pieces


def _spread(name: str, tensor: Tensor, generator: torch.Generator, tied: bool) -> Tensor:
    """Values with some spread: weights as trained ones have, norms off one, biases off zero.

    Embeddings that are the head too are small: otherwise every token predicts itself.
    """
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("e_score_correction_bias"):
        return 0.1 * noise  # float32, as published
    if tensor.dim() == 2:
        gain = 1.0 if "embed" in name and not tied else tensor.shape[1] ** -0.5
        return (gain * noise).bfloat16()
    return (1 + 0.1 * noise if "norm" in name else 0.2 * noise).bfloat16()


_FP8_ROLES = ("_proj.weight", "_proj_with_mqa.weight")


def _v3_parts() -> dict[str, dict[str, Tensor]]:
    """Published name -> parts: FP8 where DeepSeek publishes FP8, under the suffix "" otherwise."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in published_state(V3_CONFIG, seed=1).items():
        if name.endswith(_FP8_ROLES):
            codes, scale = encode_fp8_block(tensor)
            parts[name] = {"weight": codes, "weight_scale_inv": scale}
        else:
            parts[name] = {"": tensor}
    return parts


def decoded(parts: dict[str, Tensor]) -> Tensor:
    """The value of one published tensor, by the slow road: element by element of a spread-out scale, then BF16."""
    if "" in parts:
        return parts[""]
    codes, scale = parts["weight"], parts["weight_scale_inv"]
    spread = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[: codes.shape[0], : codes.shape[1]]
    return (codes.float() * spread).bfloat16()


def write_shards(out: Path, state: dict[str, Tensor], shards: int, last: tuple[str, ...] = ()) -> None:
    """Safetensors files of about equal counts with an index; the tensors named in `last` go to the last one."""
    from safetensors.torch import save_file

    names = [name for name in state if name not in last]
    step = -(-len(names) // shards)
    weight_map: dict[str, str] = {}
    for i in range(shards):
        chosen = names[i * step : (i + 1) * step] + (list(last) if i == shards - 1 else [])
        file = f"model-{i + 1:05d}-of-{shards:06d}.safetensors" if shards > 1 else "model.safetensors"
        save_file({name: state[name].contiguous() for name in chosen}, out / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(chosen, file))
    if shards > 1:
        total = sum(tensor.nbytes for tensor in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def finish_directory(out: Path, config: dict[str, Any]) -> Path:
    """config.json, and the tokenizer of the built-in tasks, which has as many words."""
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": 1, "eos_token_id": 2, "do_sample": False}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    (out / "LICENSE").write_text("Licence of the tiny model.\n")
    write_tokenizer(out)
    return out


def _plain(out: Path, config: dict[str, Any], seed: int) -> Path:
    write_shards(out, published_state(config, seed), shards=1)
    return finish_directory(out, config)

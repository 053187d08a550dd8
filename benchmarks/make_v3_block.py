"""Write one mixture-of-experts block of DeepSeek-V3 at full size: 11.5 G parameters, 11.5 GB in FP8, no holes.

    python -m benchmarks.make_v3_block OUT [--experts N] [--shards N] [--seed N]

Names, shapes and config are as published, with one block (every one of the 61 but the first three has its shapes) and
a vocabulary of 8,192. Weights are FP8 in blocks of 128 x 128 with uneven rows, columns and scales, standard deviation
near 0.02. The embedding is large enough for tokens to differ; the router gives logits of standard deviation near 1, as
after its balanced training, but for ten experts: two never chosen, eight chosen by fewer than 64 of 128 x 512 tokens.
Beside it `text.txt`: words of a Zipf-Mandelbrot distribution in runs of topics, and a tokenizer of those words.
About 2 GB of memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.make_checkpoint import write_checkpoint

VOCABULARY = 8192
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
HIDDEN = 7168
EMBEDDING_STD = 0.5
NEVER, RARELY = -10.0, -0.145  # added to scores between 0 and 1; the lowest that is chosen lies near 0.83
TOKENS = 1 << 17  # in text.txt
V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "torch_dtype": "bfloat16",
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "ep_size": 1,
    "first_k_dense_replace": 0, "hidden_act": "silu", "hidden_size": HIDDEN, "initializer_range": 0.02,
    "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048,
    "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True,
    "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 1, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 0, "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid",
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "tie_word_embeddings": False, "topk_group": 4, "topk_method": "noaux_tc", "transformers_version": "4.33.1",
    "use_cache": True, "v_head_dim": 128, "vocab_size": VOCABULARY,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
}  # fmt: skip


def make(
    out: Path, experts: int = 256, shards: int = 4, seed: int = 0, sizes: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Write checkpoint, tokenizer and text to `out`; gives parameters, linears' parameters, bytes.

    sizes: keys of config.json that differ, for a small block.
    """
    config = dict(V3)
    if experts < 256:  # for a trial: as many experts a token as the groups that stay can give
        config |= {"n_routed_experts": experts, "n_group": 2, "topk_group": 1, "num_experts_per_tok": experts // 4}
    config |= sizes or {}
    hidden, generator = config["hidden_size"], torch.Generator().manual_seed(seed + 1)
    router = torch.randn(experts, hidden, generator=generator) / hidden**0.5
    given = {
        "model.embed_tokens.weight": EMBEDDING_STD * torch.randn(VOCABULARY, hidden, generator=generator),
        "model.layers.0.mlp.gate.weight": router,
        "model.layers.0.mlp.gate.e_score_correction_bias": bias(experts, generator),
    }
    made = write_checkpoint(out, config, "fp8", shards, seed, given)
    write_words(out, generator)
    return made


def bias(experts: int, generator: torch.Generator) -> Tensor:
    """(experts,): nearly even, two experts out of reach and eight nearly so (of 256)."""
    values = 0.01 * torch.randn(experts, generator=generator)
    never, rarely = max(1, experts // 128), max(1, experts // 32)
    odd = torch.randperm(experts, generator=generator)
    values[odd[:never]] += NEVER
    values[odd[never : never + rarely]] += RARELY
    return values


def write_words(out: Path, generator: torch.Generator) -> None:
    """`text.txt`, and a tokenizer whose words are its words."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), VOCABULARY))]
    tokenizer = json.loads((Path(__file__).parent.parent / "builtin" / "nano" / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {word: i for i, word in enumerate(words)}
    (out / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"bos_token": "<bos>", "eos_token": "<eos>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    ranks = torch.arange(VOCABULARY - len(SPECIAL), dtype=torch.float64)
    usual = 1 / (ranks + 20)  # Zipf-Mandelbrot: the most frequent word is 1 in 120
    lines = []
    for _ in range(0, TOKENS, 256):
        topic = torch.rand(len(ranks), generator=generator) < 0.05  # words that this passage uses more often
        drawn = torch.multinomial(usual * (1 + 20 * topic), 256, replacement=True, generator=generator)
        lines.append(" ".join(words[i + len(SPECIAL)] for i in drawn.tolist()))
    (out / "text.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Parse, write, print the facts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--experts", type=int, default=256)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(make(options.out, options.experts, options.shards, options.seed)))


if __name__ == "__main__":
    main()

"""Memory of a training step's activations, from shapes."""

from __future__ import annotations

from deepseek_compress.distillation.objective import PIECE
from deepseek_compress.models import ModelConfig


def activations(cfg: ModelConfig, tokens: int, length: int, checkpointing: bool) -> int:
    """Return the bytes for a part of a step of `tokens` tokens in texts of `length`, and for the logits of a piece."""
    wide = cfg.moe.intermediate * cfg.moe.top_k if cfg.moe else cfg.intermediate_size
    scores = 3 * cfg.num_attention_heads * min(length, tokens)
    block = 4 * tokens * (16 * cfg.hidden_size + 4 * wide + scores)
    blocks = 1 if checkpointing else cfg.num_hidden_layers
    return blocks * block + 4 * cfg.num_hidden_layers * tokens * cfg.hidden_size + 6 * 4 * PIECE

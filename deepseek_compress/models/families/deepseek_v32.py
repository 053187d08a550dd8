"""DeepSeek-V3.2: V3 whose queries see only the tokens that a lightning indexer chose."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from deepseek_compress.models.config import Fields, Indexer, Linear, ModelConfig, Role
from deepseek_compress.models.families.deepseek_v3 import DeepseekV3
from deepseek_compress.models.family import Shape


class DeepseekV32(DeepseekV3):
    """V3 with an indexer in every block."""

    model_type: ClassVar[str] = "deepseek_v32"

    def parse(self, config: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig."""
        fields = Fields(config)
        indexer = Indexer(fields.whole("index_n_heads"), fields.whole("index_head_dim"), fields.whole("index_topk"))
        return dataclasses.replace(super().parse(config), indexer=indexer)

    def attention_norms(self, cfg: ModelConfig) -> dict[str, Shape]:
        """Return the norms of the latents and of the indexer's keys (a layer norm, with bias)."""
        dim = _indexer(cfg).head_dim
        norm = "self_attn.indexer.k_norm"
        return {**super().attention_norms(cfg), norm + ".weight": (dim,), norm + ".bias": (dim,)}

    def attention_linears(self, cfg: ModelConfig, layer: int) -> list[Linear]:
        """Latent attention; the indexer sees the same inputs as q_a and q_b."""
        indexer, hidden = _indexer(cfg), cfg.hidden_size
        found = super().attention_linears(cfg, layer)
        q_rank = cfg.mla.q_lora_rank if cfg.mla else None
        name, role, source = "self_attn.indexer.", Role.INDEXER, f"{self.names.attention}.in"
        extra = [
            Linear(name + "wk", role, indexer.head_dim, hidden, source, "indexer.wk+weights_proj"),
            Linear(name + "weights_proj", role, indexer.heads, hidden, source, "indexer.wk+weights_proj"),
            Linear(name + "wq_b", role, indexer.heads * indexer.head_dim, q_rank or hidden, self.names.q_b),
        ]
        return [*found[:-1], *extra, found[-1]]


def _indexer(cfg: ModelConfig) -> Indexer:
    if cfg.indexer is None:
        raise ValueError(f"{cfg.model_type} has no indexer")
    return cfg.indexer

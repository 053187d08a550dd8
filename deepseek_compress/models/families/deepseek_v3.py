"""DeepSeek-V3, R1, V3.1: latent attention, sigmoid routing in groups, a bias that balances, MTP blocks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from deepseek_compress.models.config import Fields, Linear, Mla, ModelConfig, Moe, Role, parse_rope
from deepseek_compress.models.family import Family, Shape, attention_linear, mlp_linears
from deepseek_compress.models.mla import latent_attention

METHODS = ("greedy", "group_limited_greedy", "noaux_tc")
SCORINGS = ("softmax", "sigmoid")


class DeepseekV3(Family):
    """Latent attention and mixture of experts; the base of V2 and V3.2."""

    model_type: ClassVar[str] = "deepseek_v3"
    method: ClassVar[str] = "noaux_tc"  # transformers drops topk_method and scoring_func when it saves a config
    scoring: ClassVar[str] = "sigmoid"
    normalize: ClassVar[bool] = True
    scaling: ClassVar[float] = 2.5
    attention = staticmethod(latent_attention)

    def parse(self, config: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig."""
        # head_dim of a saved config is the rotated part only; it plays no role in latent attention
        base = super().parse({**config, "head_dim": 1, "num_key_value_heads": None})
        fields = Fields(config)
        mla = Mla(
            q_lora_rank=fields.optional("q_lora_rank"),
            kv_lora_rank=fields.whole("kv_lora_rank"),
            nope=fields.whole("qk_nope_head_dim"),
            rope=fields.whole("qk_rope_head_dim"),
            value=fields.whole("v_head_dim"),
        )
        return dataclasses.replace(
            base,
            head_dim=mla.nope + mla.rope,
            rope=parse_rope(config, mla.rope, interleaved=fields.flag("rope_interleave", True)),
            mla=mla,
            moe=self.parse_moe(fields) if fields.config.get("n_routed_experts") else None,
            num_nextn_predict_layers=fields.whole("num_nextn_predict_layers", 0),
        )

    def parse_moe(self, fields: Fields) -> Moe:
        """Return the routing of `config.json`, with the family's defaults for keys that savers drop."""
        return Moe(
            experts=fields.whole("n_routed_experts"),
            shared=fields.whole("n_shared_experts", 0),
            top_k=fields.whole("num_experts_per_tok"),
            intermediate=fields.whole("moe_intermediate_size"),
            first_dense=fields.whole("first_k_dense_replace", 0),
            layer_freq=fields.whole("moe_layer_freq", 1),
            groups=fields.whole("n_group", 1),
            top_groups=fields.whole("topk_group", 1),
            method=fields.text("topk_method", self.method, METHODS),
            scoring=fields.text("scoring_func", self.scoring, SCORINGS),
            normalize=fields.flag("norm_topk_prob", self.normalize),
            scaling=fields.number("routed_scaling_factor", self.scaling),
            names=self.names.ffn,
        )

    def has_bias(self, cfg: ModelConfig, name: str) -> bool:
        """attention_bias is for the projections from and to the hidden state only."""
        return cfg.o_bias and name in (self.names.q_a, self.names.kv_a, self.names.o)

    def attention_norms(self, cfg: ModelConfig) -> dict[str, Shape]:
        """Return the norms of the latents."""
        mla = _mla(cfg)
        found: dict[str, Shape] = {f"{self.names.kv_a_norm}.weight": (mla.kv_lora_rank,)}
        if mla.q_lora_rank is not None:
            found[f"{self.names.q_a_norm}.weight"] = (mla.q_lora_rank,)
        return found

    def attention_linears(self, cfg: ModelConfig, layer: int) -> list[Linear]:
        """Latent attention: q_a and kv_a see the same input."""
        mla, hidden, heads = _mla(cfg), cfg.hidden_size, cfg.num_attention_heads
        kv_a = mla.kv_lora_rank + mla.rope
        q_rows = heads * (mla.nope + mla.rope)
        names, source = self.names, f"{self.names.attention}.in"
        if mla.q_lora_rank is None:
            found = [
                attention_linear(names.q, q_rows, hidden, source),
                attention_linear(names.kv_a, kv_a, hidden, source),
            ]
        else:
            found = [
                attention_linear(names.q_a, mla.q_lora_rank, hidden, source, "q_a+kv_a"),
                attention_linear(names.kv_a, kv_a, hidden, source, "q_a+kv_a"),
                attention_linear(names.q_b, q_rows, mla.q_lora_rank),
            ]
        return [
            *found,
            attention_linear(names.kv_b, heads * (mla.nope + mla.value), mla.kv_lora_rank),
            attention_linear(names.o, hidden, heads * mla.value),
        ]

    def linears(self, cfg: ModelConfig, layer: int) -> list[Linear]:
        """Attention, then the dense MLP or the shared experts and the routed ones in order."""
        attention, hidden = self.attention_linears(cfg, layer), cfg.hidden_size
        moe, names = cfg.moe, self.names.ffn
        if moe is None or not cfg.is_moe(layer):
            return [*attention, *mlp_linears(names, names.mlp, Role.MLP, hidden, cfg.intermediate_size)]
        found = attention
        if moe.shared:
            width = moe.intermediate * moe.shared
            found += mlp_linears(names, names.shared, Role.SHARED_EXPERT, hidden, width)
        for expert in range(moe.experts):
            found += mlp_linears(names, f"{names.experts}.{expert}", Role.EXPERT, hidden, moe.intermediate)
        return found

    def block_tensors(self, cfg: ModelConfig, layer: int) -> dict[str, Shape]:
        """Tensors of one block, the router's included."""
        found = super().block_tensors(cfg, layer)
        if cfg.moe is not None and cfg.is_moe(layer):
            found[self.names.ffn.router] = (cfg.moe.experts, cfg.hidden_size)
            if cfg.moe.method == "noaux_tc":
                found[self.names.ffn.bias] = (cfg.moe.experts,)
        return found

    def mtp_tensors(self, cfg: ModelConfig) -> dict[str, Shape]:
        """Multi-token prediction (arXiv 2412.19437, section 2.2): blocks after the last one of the model."""
        found: dict[str, Shape] = {}
        hidden, vocab = cfg.hidden_size, cfg.vocab_size
        for layer in range(cfg.num_hidden_layers, cfg.num_hidden_layers + cfg.num_nextn_predict_layers):
            block = self.block_tensors(cfg, layer)
            block |= {"enorm.weight": (hidden,), "hnorm.weight": (hidden,), "shared_head.norm.weight": (hidden,)}
            block |= {"eh_proj.weight": (hidden, 2 * hidden)}
            block |= {"embed_tokens.weight": (vocab, hidden), "shared_head.head.weight": (vocab, hidden)}
            found |= {f"{self.prefix(layer)}.{name}": shape for name, shape in block.items()}
        return found


def _mla(cfg: ModelConfig) -> Mla:
    if cfg.mla is None:
        raise ValueError(f"{cfg.model_type} has no latent attention")
    return cfg.mla

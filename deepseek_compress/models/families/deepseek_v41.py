"""DeepSeek-V4.1: shared entries, hyper-connections that hand on their weights, Engram; text alone is run.

The sizes of the text model stand in `text_config`. Tensors of the image encoder and of the blocks that draft tokens
(DSpark, `mtp.*`) belong to a checkpoint and are kept as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.models import hyper
from deepseek_compress.models.cache import KvCache
from deepseek_compress.models.carried import carried, first
from deepseek_compress.models.config import (
    Compressed,
    Fields,
    HyperConnections,
    Indexer,
    Linear,
    ModelConfig,
    Moe,
    Names,
    Role,
    parse_rope,
)
from deepseek_compress.models.engram import TABLE, engram_part
from deepseek_compress.models.families.deepseek_v4 import FFN, NAMES, SCORINGS
from deepseek_compress.models.families.v41_config import (
    config_problems,
    nested,
    parse_drafts,
    parse_engram,
    parse_entries,
    parse_ratios,
    parse_vision,
)
from deepseek_compress.models.families.v41_tensors import block_tensors, draft_tensors, linears, vision_tensors
from deepseek_compress.models.family import Family, Shape
from deepseek_compress.models.layers import rms_norm
from deepseek_compress.models.shared_entries import shared_attention
from deepseek_compress.models.weights import Weights
from deepseek_compress.models.wide import wide

UNTOUCHED = ("mtp.", "vision.", "aligner.", "image_")  # copied byte for byte


class DeepseekV41(Family):
    """V4.1-Flash."""

    model_type: ClassVar[str] = "deepseek_v41"
    names: ClassVar[Names] = NAMES
    cached: ClassVar[bool] = False
    gathered: ClassVar[frozenset[str]] = frozenset({TABLE})

    def parse(self, config: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig."""
        text = nested(config)
        fields = Fields(text)
        base = super().parse({**text, "intermediate_size": fields.whole("moe_intermediate_size")})
        layers, dim = base.num_hidden_layers, fields.whole("qk_rope_head_dim")
        plain = {key: text.get(key) for key in ("rope_theta", "max_position_embeddings")}
        theta = fields.number("compress_rope_theta", 160000.0)
        long = {**plain, "rope_parameters": {**(text.get("rope_scaling") or {}), "rope_theta": theta}}
        cfg = dataclasses.replace(
            base,
            # the published code does not scale cos and sin by yarn's temperature
            rope=dataclasses.replace(parse_rope(long, dim, interleaved=True), attention_factor=1.0),
            compressed=Compressed(
                rates=parse_ratios(text, layers),
                overlapping=(False,) * layers,
                window=fields.whole("sliding_window"),
                q_lora_rank=fields.whole("q_lora_rank"),
                o_groups=fields.whole("o_groups"),
                o_lora_rank=fields.whole("o_lora_rank"),
                rope_window=parse_rope(plain, dim, interleaved=True),
            ),
            indexer=Indexer(fields.whole("index_n_heads"), fields.whole("index_head_dim"), fields.whole("index_topk")),
            entries=parse_entries(fields, layers),
            moe=_moe(fields),
            streams=HyperConnections(
                fields.whole("hc_mult"), fields.whole("hc_sinkhorn_iters"), fields.number("hc_eps", 1e-6)
            ),
            engram=parse_engram(fields, layers),
            vision=parse_vision(config),
            num_nextn_predict_layers=fields.whole("num_nextn_predict_layers", 0),
            drafts=parse_drafts(fields),
            eos_token_ids=Fields({**text, **config}).eos(),
        )
        raise_problems(config_problems(cfg))
        return cfg

    def located(self, cfg: ModelConfig, folder: Path) -> ModelConfig:
        """`cfg` with the place of the tokenizer, which Engram folds tokens by."""
        if cfg.engram is None:
            return cfg
        return dataclasses.replace(cfg, engram=dataclasses.replace(cfg.engram, folder=folder))

    def role(self, name: str) -> Role:
        """Return what a tensor is for; hyper-connections are small, float32 and never changed, like norms."""
        if name.startswith(UNTOUCHED):
            return Role.MTP if name.startswith("mtp.") else Role.VISION
        if "hc_" in name:
            return Role.NORM
        return Role.ENGRAM if "engram." in name else super().role(name)

    def untouched(self, name: str) -> bool:
        """Whether a tensor is written with its bytes, whatever becomes of others: servers read these as published."""
        return name.startswith(UNTOUCHED) or name.endswith(TABLE)

    def ignored(self) -> tuple[str, ...]:
        """Patterns of the modules that `untouched` covers."""
        return tuple(f"re:(?:.+\\.)?{name}" for name in ("mtp\\.", "vision\\.", "aligner\\.", "engram\\.embed$"))

    def without_drafts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of config.json that say that the drafting blocks are not there."""
        text = dict(nested(config))
        ratios = text["compress_ratios"][: text["num_hidden_layers"]]
        kept = {key: value for key, value in text.items() if not key.startswith("dspark_")}
        return {"text_config": {**kept, "num_nextn_predict_layers": 0, "compress_ratios": ratios}}

    def without_vision(self) -> dict[str, Any]:
        """Keys of config.json that say that the image encoder is not there."""
        return {"vision_config": None, "image_token_id": None}

    # -- which tensors there are -------------------------------------------------------------------------------------

    def block_tensors(self, cfg: ModelConfig, layer: int) -> dict[str, Shape]:
        """Tensors of one block."""
        return block_tensors(cfg, layer)

    def linears(self, cfg: ModelConfig, layer: int) -> list[Linear]:
        """Engram, attention, shared experts, routed experts."""
        return linears(cfg, layer)

    def mtp_tensors(self, cfg: ModelConfig) -> dict[str, Shape]:
        """Return the drafting blocks."""
        return draft_tensors(cfg)

    def vision_tensors(self, cfg: ModelConfig) -> dict[str, Shape]:
        """Return the image encoder, and what leads from it to the text model."""
        return vision_tensors(cfg)

    # -- how a block runs --------------------------------------------------------------------------------------------

    def embed(self, cfg: ModelConfig, embedding: Tensor, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> rows (B, T, width), float32 at least, see `carried`."""
        return first(cfg, wide(super().embed(cfg, embedding, tokens)), tokens)

    def residual(self, cfg: ModelConfig, hidden: Tensor) -> Tensor:
        """Rows (B, T, width) -> the streams alone (B, T, N, hidden_size)."""
        return carried(cfg, hidden).streams

    def chooses(self, cfg: ModelConfig, layer: int) -> bool:
        """Those with an indexer."""
        return cfg.entries is not None and layer in cfg.entries.index_sources

    def choice(self, cfg: ModelConfig, layer: int, hidden: Tensor) -> Tensor | None:
        """Rows (B, T, width) of a block with an indexer -> its choice (B, T, top_k)."""
        return carried(cfg, hidden).chosen.long() if self.chooses(cfg, layer) else None

    def final_hidden(self, cfg: ModelConfig, weights: Weights, hidden: Tensor) -> Tensor:
        """Rows (B, T, width) -> the input of the head (B, T, hidden_size), by the last weights that were handed on."""
        return _site(cfg, weights, self.names.norm, hidden)

    def attention_part(
        self,
        cfg: ModelConfig,
        layer: int,
        weights: Weights,
        hidden: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: KvCache | None = None,
    ) -> Tensor:
        """Rows (B, T, width) -> rows with what Engram and attention add."""
        if cache is not None or mask is not None:
            raise ValueError(f"{cfg.model_type} runs whole texts, without a cache and without padding at the left")
        state = carried(cfg, hidden)
        if cfg.engram is not None and layer in cfg.engram.layers:
            tokens = state.tokens.long()
            added = engram_part(cfg.engram, layer, weights, state.streams, tokens, cfg.rms_norm_eps)
            state = state._replace(streams=added)
        x = _collapsed(cfg, weights, "attn_norm.weight", state.streams, state.pre)
        out, after = shared_attention(cfg, layer, weights, x, positions, state)
        return _spread(cfg, weights, "hc_attn", after.row(), out)

    def ffn_input(self, cfg: ModelConfig, layer: int, weights: Weights, hidden: Tensor) -> Tensor:
        """Rows after attention -> input of the experts (B, T, hidden_size)."""
        return _site(cfg, weights, "ffn_norm.weight", hidden)

    def ffn_output(self, cfg: ModelConfig, layer: int, weights: Weights, hidden: Tensor, added: Tensor) -> Tensor:
        """Rows after attention, and what the experts add -> rows of the next block."""
        return _spread(cfg, weights, "hc_ffn", hidden, added)


def _site(cfg: ModelConfig, weights: Weights, norm: str, hidden: Tensor) -> Tensor:
    state = carried(cfg, hidden)
    return _collapsed(cfg, weights, norm, state.streams, state.pre)


def _collapsed(cfg: ModelConfig, weights: Weights, norm: str, streams: Tensor, pre: Tensor) -> Tensor:
    """streams (B, T, N, hidden) by pre (B, T, N), normed: (B, T, hidden) in the norm's type."""
    weight = weights[norm]
    return rms_norm((pre.unsqueeze(-1) * streams).sum(2).to(weight.dtype), weight, cfg.rms_norm_eps)


def _spread(cfg: ModelConfig, weights: Weights, name: str, hidden: Tensor, added: Tensor) -> Tensor:
    """Rows with `added` (B, T, hidden) spread over their streams, and with the weights for the next site."""
    assert cfg.streams is not None
    state = carried(cfg, hidden)
    mixed = hyper.mixing(cfg.streams, weights, name, state.streams, cfg.rms_norm_eps)
    streams = mixed.post.unsqueeze(-1) * added.to(hidden.dtype).unsqueeze(-2) + mixed.comb.mT @ state.streams
    return state._replace(streams=streams, pre=mixed.pre).row()


def _moe(fields: Fields) -> Moe:
    if fields.whole("num_hash_layers", 0):
        raise DscError("config.json: num_hash_layers", "blocks routed by token id belong to deepseek_v4")
    return Moe(
        experts=fields.whole("n_routed_experts"),
        shared=fields.whole("n_shared_experts", 1),
        top_k=fields.whole("num_experts_per_tok"),
        intermediate=fields.whole("moe_intermediate_size"),
        first_dense=0,
        method=fields.text("topk_method", "noaux_tc", ("noaux_tc",)),
        scoring=fields.text("scoring_func", "sqrtsoftplus", SCORINGS),
        normalize=fields.flag("norm_topk_prob", True),
        scaling=fields.number("routed_scaling_factor", 1.5),
        swiglu_limit=fields.number("swiglu_limit", 10.0),
        names=FFN,
    )

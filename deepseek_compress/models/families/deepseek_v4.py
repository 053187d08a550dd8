"""DeepSeek-V4: compressed attention, hyper-connections, every block a mixture of experts, the first routed by token id.

Tensors have the names that DeepSeek publishes ("layers.0.attn.wq_a.weight", no "model." prefix). `wo_a` is a product
per group of heads, not one linear: vLLM and SGLang read it in 16 bits or FP8 blocks alone, and the compressors and the
indexer's `weights_proj` in 16 bits, so those are kept. MTP blocks are checked and kept, not run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from deepseek_compress.checkpoint import Header
from deepseek_compress.errors import DscError
from deepseek_compress.models import hyper
from deepseek_compress.models.cache import KvCache
from deepseek_compress.models.compressed import compressed_attention
from deepseek_compress.models.config import (
    Compressed,
    FfnNames,
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
from deepseek_compress.models.family import Family, Shape
from deepseek_compress.models.layers import rms_norm
from deepseek_compress.models.weights import Weights

FFN = FfnNames(
    mlp="ffn", experts="ffn.experts", shared="ffn.shared_experts", router="ffn.gate.weight", bias="ffn.gate.bias",
    table="ffn.gate.tid2eid", gate="w1", up="w3", down="w2",
)  # fmt: skip
NAMES = Names(
    block="layers.{}", embedding="embed.weight", head="head.weight", norm="norm.weight",
    attention_norm="attn_norm", ffn_norm="ffn_norm", attention="attn", o="attn.wo_b", ffn=FFN,
)  # fmt: skip
KINDS = ("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")
RATES = {KINDS[1]: 4, KINDS[2]: 128}
SCORINGS = ("softmax", "sigmoid", "sqrtsoftplus")


class DeepseekV4(Family):
    """V4-Flash and V4-Pro."""

    model_type: ClassVar[str] = "deepseek_v4"
    names: ClassVar[Names] = NAMES
    cached: ClassVar[bool] = False
    kept: ClassVar[str] = "attn.wo_a, compressors and indexer.weights_proj, which servers read in no fewer"

    def parse(self, config: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig."""
        fields = Fields(config)
        base = super().parse({**config, "intermediate_size": fields.whole("moe_intermediate_size")})
        layers = base.num_hidden_layers
        rates, overlapping = _kinds(config, layers)
        dim = fields.whole("qk_rope_head_dim", int(base.head_dim * fields.number("partial_rotary_factor", 0.125)))
        window_rope, rope = _ropes(config, dim)
        compressed = Compressed(
            rates=rates,
            overlapping=overlapping,
            window=fields.whole("sliding_window", 128),
            q_lora_rank=fields.whole("q_lora_rank"),
            o_groups=fields.whole("o_groups"),
            o_lora_rank=fields.whole("o_lora_rank"),
            rope_window=window_rope,
        )
        return dataclasses.replace(
            base,
            rope=rope,
            compressed=compressed,
            moe=_moe(config, layers),
            indexer=Indexer(fields.whole("index_n_heads"), fields.whole("index_head_dim"), fields.whole("index_topk")),
            streams=HyperConnections(
                fields.whole("hc_mult", 4), fields.whole("hc_sinkhorn_iters", 20), fields.number("hc_eps", 1e-6)
            ),
            num_nextn_predict_layers=fields.whole("num_nextn_predict_layers", 0),
        )

    def role(self, name: str) -> Role:
        """Return a tensor's role; hyper-connections are small, float32 and never changed, like norms."""
        return Role.NORM if "hc_" in name and not name.startswith("mtp.") else super().role(name)

    def problems(self, header: Header) -> list[DscError]:
        """Every missing, unknown and misshaped tensor; blocks that draft in another way than `mtp_tensors` pass."""
        if header.config.get("num_nextn_predict_layers") and "mtp.0.e_proj.weight" in header.tensors:
            return super().problems(header)
        drafts = self.drafts(header)
        plain = {name: info for name, info in header.tensors.items() if name not in drafts}
        return super().problems(dataclasses.replace(header, tensors=plain))

    def drafts(self, header: Header) -> dict[str, Shape]:
        """Later releases draft with blocks of another layout (DSpark)."""
        return {name: info.shape for name, info in header.tensors.items() if name.startswith("mtp.")}

    def mtp_tensors(self, cfg: ModelConfig) -> dict[str, Shape]:
        """Blocks with a window alone and a router with a bias; `e_proj` and `h_proj` let token and streams in."""
        kinds, moe, streams = _parts(cfg)
        alone = dataclasses.replace(
            cfg,
            compressed=dataclasses.replace(kinds, rates=(0,), overlapping=(False,)),
            moe=dataclasses.replace(moe, hash_layers=0),
        )
        hidden, n = cfg.hidden_size, streams.streams
        block = {**self.block_tensors(alone, 0), "e_proj.weight": (hidden, hidden), "h_proj.weight": (hidden, hidden)}
        block |= {f"{name}.weight": (hidden,) for name in ("enorm", "hnorm", "norm")} | _hc_head(n, hidden)
        count = cfg.num_nextn_predict_layers
        return {f"mtp.{index}.{name}": shape for index in range(count) for name, shape in block.items()}

    def tensors(self, cfg: ModelConfig) -> dict[str, Shape]:
        """Every tensor, those of MTP blocks included."""
        n = cfg.streams.streams if cfg.streams else 1
        return {**super().tensors(cfg), **_hc_head(n, cfg.hidden_size)}

    def block_tensors(self, cfg: ModelConfig, layer: int) -> dict[str, Shape]:
        """Tensors of one block."""
        hidden, vocab = cfg.hidden_size, cfg.vocab_size
        kinds, moe, streams = _parts(cfg)
        n = streams.streams
        found: dict[str, Shape] = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
        for name in ("hc_attn", "hc_ffn"):
            found |= {f"{name}_fn": ((2 + n) * n, n * hidden), f"{name}_base": ((2 + n) * n,), f"{name}_scale": (3,)}
        found |= {"attn.q_norm.weight": (kinds.q_lora_rank,), "attn.kv_norm.weight": (cfg.head_dim,)}
        width = cfg.num_attention_heads * cfg.head_dim // kinds.o_groups
        found |= {"attn.attn_sink": (cfg.num_attention_heads,)}
        found |= {"attn.wo_a.weight": (kinds.o_groups * kinds.o_lora_rank, width)}
        if kinds.rates[layer]:
            found |= _compressor(cfg, "attn.compressor", kinds.rates[layer], cfg.head_dim, kinds.overlapping[layer])
        if kinds.overlapping[layer] and cfg.indexer is not None:
            name, dim = "attn.indexer", cfg.indexer.head_dim
            found |= _compressor(cfg, name + ".compressor", kinds.rates[layer], dim, True)
            found |= {name + ".weights_proj.weight": (cfg.indexer.heads, hidden)}
        found |= {linear.name + ".weight": (linear.rows, linear.columns) for linear in self.linears(cfg, layer)}
        found[moe.names.router] = (moe.experts, hidden)
        if layer < moe.hash_layers:
            found[moe.names.table] = (vocab, moe.top_k)
        else:
            found[moe.names.bias] = (moe.experts,)
        return found

    def linears(self, cfg: ModelConfig, layer: int) -> list[Linear]:
        """Attention, shared experts, routed experts."""
        kinds, moe, _ = _parts(cfg)
        hidden, heads, dim = cfg.hidden_size, cfg.num_attention_heads, cfg.head_dim
        role = Role.ATTENTION
        found = [
            Linear("attn.wq_a", role, kinds.q_lora_rank, hidden, "attn.in", "wq_a+wkv"),
            Linear("attn.wkv", role, dim, hidden, "attn.in", "wq_a+wkv"),
            Linear("attn.wq_b", role, heads * dim, kinds.q_lora_rank, "attn.wq_b"),
        ]
        if kinds.overlapping[layer] and cfg.indexer is not None:
            rows = cfg.indexer.heads * cfg.indexer.head_dim
            found.append(Linear("attn.indexer.wq_b", Role.INDEXER, rows, kinds.q_lora_rank, "attn.wq_b"))
        found.append(Linear("attn.wo_b", role, hidden, kinds.o_groups * kinds.o_lora_rank, "attn.wo_b"))
        if moe.shared:
            found += _mlp(moe, moe.names.shared, Role.SHARED_EXPERT, hidden, moe.intermediate * moe.shared)
        for expert in range(moe.experts):
            found += _mlp(moe, f"{moe.names.experts}.{expert}", Role.EXPERT, hidden, moe.intermediate)
        return found

    def embed(self, cfg: ModelConfig, embedding: Tensor, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> (B, T, streams, hidden_size), the streams equal."""
        _, _, streams = _parts(cfg)
        hidden = super().embed(cfg, embedding, tokens)
        return hidden.unsqueeze(2).expand(-1, -1, streams.streams, -1).contiguous()

    def final_hidden(self, cfg: ModelConfig, weights: Weights, hidden: Tensor) -> Tensor:
        """(B, T, streams, hidden_size) -> the input of the head (B, T, hidden_size)."""
        _, _, streams = _parts(cfg)
        collapsed = hyper.head(streams, weights, hidden, cfg.rms_norm_eps)
        return rms_norm(collapsed, weights[self.names.norm], cfg.rms_norm_eps)

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
        """Streams (B, T, N, hidden_size) -> streams with what attention adds."""
        if cache is not None:
            raise ValueError(f"{cfg.model_type} runs without a cache")
        _, _, streams = _parts(cfg)
        mixed = hyper.mixing(streams, weights, "hc_attn", hidden, cfg.rms_norm_eps)
        x = rms_norm(hyper.collapse(mixed, hidden), weights["attn_norm.weight"], cfg.rms_norm_eps)
        return hyper.expand(mixed, hidden, compressed_attention(cfg, layer, weights, x, positions, mask))

    def ffn_input(self, cfg: ModelConfig, layer: int, weights: Weights, hidden: Tensor) -> Tensor:
        """Streams after attention -> input of the experts (B, T, hidden_size)."""
        _, _, streams = _parts(cfg)
        mixed = hyper.mixing(streams, weights, "hc_ffn", hidden, cfg.rms_norm_eps)
        return rms_norm(hyper.collapse(mixed, hidden), weights["ffn_norm.weight"], cfg.rms_norm_eps)

    def ffn_output(self, cfg: ModelConfig, layer: int, weights: Weights, hidden: Tensor, added: Tensor) -> Tensor:
        """Streams after attention, and what the experts add -> streams of the next block."""
        _, _, streams = _parts(cfg)
        return hyper.expand(hyper.mixing(streams, weights, "hc_ffn", hidden, cfg.rms_norm_eps), hidden, added)


def _parts(cfg: ModelConfig) -> tuple[Compressed, Moe, HyperConnections]:
    if cfg.compressed is None or cfg.moe is None or cfg.streams is None:
        raise ValueError(f"{cfg.model_type} is not DeepSeek-V4")
    return cfg.compressed, cfg.moe, cfg.streams


def _kinds(config: Mapping[str, Any], layers: int) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """Rate of each block, and whether its entries overlap: `compress_ratios` as published, or `layer_types`."""
    rates = {**RATES, **(config.get("compress_rates") or {})}
    types = config.get("layer_types")
    if types is None:
        ratios = config.get("compress_ratios")
        if not isinstance(ratios, list):
            raise DscError("config.json: neither compress_ratios nor layer_types", "give the published config.json")
        names = {0: KINDS[0], rates[KINDS[1]]: KINDS[1], rates[KINDS[2]]: KINDS[2]}
        types = [names.get(ratio, str(ratio)) for ratio in ratios]
    types = list(types)[:layers]
    unknown = sorted(set(types) - set(KINDS))
    if unknown or len(types) < layers:
        what = (
            f"config.json: attention of {len(types)} blocks for {layers}, unknown kinds: {', '.join(unknown) or 'none'}"
        )
        raise DscError(what, f"known: {', '.join(KINDS)}")
    return tuple(rates.get(kind, 0) for kind in types), tuple(kind == KINDS[1] for kind in types)


def _ropes(config: Mapping[str, Any], dim: int) -> tuple[Any, Any]:
    """Rotary settings of blocks with a window alone, and of those with compressed entries."""
    nested = config.get("rope_parameters") or {}
    theta = Fields(config).number("compress_rope_theta", 160000.0)
    plain = {"rope_theta": config.get("rope_theta"), "max_position_embeddings": config.get("max_position_embeddings")}
    if "main" in nested:
        main, compress = ({**plain, "rope_parameters": nested[kind]} for kind in ("main", "compress"))
    else:
        main = plain
        scaling = {**(nested or config.get("rope_scaling") or {}), "rope_theta": theta}
        compress = {**plain, "rope_parameters": scaling}
    found = parse_rope(compress, dim, interleaved=True)
    # the published code does not scale cos and sin by yarn's temperature
    return parse_rope(main, dim, interleaved=True), dataclasses.replace(found, attention_factor=1.0)


def _moe(config: Mapping[str, Any], layers: int) -> Moe:
    fields = Fields(config)
    types = config.get("mlp_layer_types")
    hashed = fields.whole("num_hash_layers", 3) if types is None else sum(kind == "hash_moe" for kind in types)
    return Moe(
        experts=fields.whole("n_routed_experts"),
        shared=fields.whole("n_shared_experts", 1),
        top_k=fields.whole("num_experts_per_tok"),
        intermediate=fields.whole("moe_intermediate_size"),
        first_dense=0,
        method="noaux_tc",
        scoring=fields.text("scoring_func", "sqrtsoftplus", SCORINGS),
        normalize=True,
        scaling=fields.number("routed_scaling_factor", 1.5),
        swiglu_limit=fields.number("swiglu_limit", 10.0),
        hash_layers=min(hashed, layers),
        names=FFN,
    )


def _hc_head(streams: int, hidden: int) -> dict[str, Shape]:
    """Collapse the streams before the head."""
    return {"hc_head_fn": (streams, streams * hidden), "hc_head_base": (streams,), "hc_head_scale": (1,)}


def _compressor(cfg: ModelConfig, name: str, rate: int, dim: int, overlapping: bool) -> dict[str, Shape]:
    width = 2 * dim if overlapping else dim
    weight = (width, cfg.hidden_size)
    return {
        f"{name}.wkv.weight": weight,
        f"{name}.wgate.weight": weight,
        f"{name}.ape": (rate, width),
        f"{name}.norm.weight": (dim,),
    }


def _mlp(moe: Moe, name: str, role: Role, hidden: int, width: int) -> list[Linear]:
    fused = "experts" if role is Role.EXPERT else "gate_up"
    down = "experts" if role is Role.EXPERT else None
    return [
        Linear(f"{name}.{moe.names.gate}", role, width, hidden, f"{name}.in", fused),
        Linear(f"{name}.{moe.names.up}", role, width, hidden, f"{name}.in", fused),
        Linear(f"{name}.{moe.names.down}", role, hidden, width, f"{name}.{moe.names.down}", down),
    ]

"""A `config.json`, typed: dimensions, rotary embedding, latent attention, mixture of experts.

Both spellings of the rotary settings are read: `rope_theta` + `rope_scaling` (as DeepSeek, Qwen and Meta publish) and
`rope_parameters` (as transformers 5 saves).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from deepseek_compress import limits
from deepseek_compress.errors import DscError


class Role(str, Enum):
    """Purpose of a tensor."""

    ATTENTION = "attention"
    MLP = "mlp"
    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    ROUTER = "router"
    NORM = "norm"
    EMBEDDING = "embedding"
    HEAD = "head"
    MTP = "mtp"
    INDEXER = "indexer"
    ENGRAM = "engram"
    VISION = "vision"

    def __str__(self) -> str:
        return self.value


class Linear(NamedTuple):
    """One weight matrix of a block that a recipe may change. Names are local to the block."""

    name: str  # "mlp.experts.3.gate_proj"; its tensor is name + ".weight"
    role: Role
    rows: int
    columns: int
    input: str  # linears with the same `input` see the same activations and share one Hessian
    fused: str | None = None  # linears that serving engines fuse and that must therefore share one scheme

    @property
    def expert(self) -> int | None:
        """Number of the routed expert it belongs to: 3; None for all others."""
        return int(self.name.split(".")[2]) if self.role is Role.EXPERT else None


@dataclass(frozen=True)
class Rope:
    """Rotary embedding: `dim` rotated channels per head and how their frequencies are scaled."""

    theta: float
    dim: int
    kind: str = "default"  # default | linear | yarn | llama3
    factor: float = 1.0
    original_length: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    interleaved: bool = False  # channels (0,1), (2,3), ... form the pairs, instead of (i, i + dim/2)


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

    q_lora_rank: int | None
    kv_lora_rank: int
    nope: int  # channels per head without rotation
    rope: int  # rotated channels: per head in the queries, shared by all heads in the keys
    value: int  # channels per head of the values


@dataclass(frozen=True)
class Indexer:
    """Lightning indexer of sparse attention (DeepSeek-V3.2): which tokens a query may see."""

    heads: int
    head_dim: int
    top_k: int


class FfnNames(NamedTuple):
    """Names of a family's MLP and expert tensors, within a block."""

    mlp: str = "mlp"
    experts: str = "mlp.experts"
    shared: str = "mlp.shared_experts"
    router: str = "mlp.gate.weight"
    bias: str = "mlp.gate.e_score_correction_bias"
    table: str = "mlp.gate.tid2eid"  # token id -> experts, in blocks that are routed by it
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


FFN_NAMES = FfnNames()


class Names(NamedTuple):
    """Names of a family's tensors: those outside blocks by their whole name, modules of a block within it."""

    block: str = "model.layers.{}"
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    norm: str = "model.norm.weight"
    attention_norm: str = "input_layernorm"
    ffn_norm: str = "post_attention_layernorm"
    attention: str = "self_attn"  # what the modules of attention are under
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    o: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"  # over the channels of a head, in families that have them
    k_norm: str = "self_attn.k_norm"
    q_a: str = "self_attn.q_a_proj"  # latent attention: down and up again
    q_a_norm: str = "self_attn.q_a_layernorm"
    q_b: str = "self_attn.q_b_proj"
    kv_a: str = "self_attn.kv_a_proj_with_mqa"
    kv_a_norm: str = "self_attn.kv_a_layernorm"
    kv_b: str = "self_attn.kv_b_proj"
    ffn: FfnNames = FFN_NAMES


NAMES = Names()


@dataclass(frozen=True)
class Moe:
    """Mixture of experts and its router."""

    experts: int
    shared: int
    top_k: int
    intermediate: int
    first_dense: int  # blocks before this one are dense
    layer_freq: int = 1
    groups: int = 1
    top_groups: int = 1
    method: str = "greedy"  # greedy | group_limited_greedy | noaux_tc
    scoring: str = "softmax"  # softmax | sigmoid | sqrtsoftplus
    normalize: bool = False
    scaling: float = 1.0
    swiglu_limit: float | None = None  # gate and up are clipped to it (DeepSeek-V4)
    hash_layers: int = 0  # first blocks, routed by token id (DeepSeek-V4)
    names: FfnNames = FFN_NAMES


@dataclass(frozen=True)
class HyperConnections:
    """Manifold-constrained hyper-connections (DeepSeek-V4): parallel residual streams."""

    streams: int
    sinkhorn_iterations: int
    eps: float


@dataclass(frozen=True)
class Compressed:
    """Attention of DeepSeek-V4: a sliding window and, in most blocks, compressed long-range entries."""

    rates: tuple[int, ...]  # per block: tokens that become one entry, 0 for a sliding window alone
    overlapping: tuple[bool, ...]  # per block: entries overlap and an indexer chooses among them
    window: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    rope_window: Rope  # of blocks without compressed entries; `rope` of the model is for those with them


@dataclass(frozen=True)
class SharedEntries:
    """Who makes the entries of DeepSeek-V4.1, and who chooses; blocks between two sources use the former's."""

    sources: tuple[int, ...]  # blocks that make entries and index keys
    index_sources: tuple[int, ...]  # blocks that choose
    candidate_source: int  # the one whose best blocks of entries are all that later ones choose from
    candidate_blocks: int
    candidate_block_size: int
    rounded: bool = True  # keys, queries and entries are rounded to 8 and 4 bits, as the published model does


@dataclass(frozen=True)
class Engram:
    """Tables of hashed n-grams (DeepSeek-V4.1), looked up before a block runs."""

    layers: tuple[int, ...]
    rows: tuple[int, ...]  # of each layer's table
    ngrams: int  # 2, 3, ... to this many tokens are hashed
    vocabulary: int  # every hash is taken modulo a prime that is not below this
    heads: int  # hashes of an n-gram
    head_dim: int  # columns of a table
    pad_token: int  # stands where an n-gram reaches beyond the text
    tokens: int  # distinct tokens once case, accents and spaces are folded
    folder: Path | None = None  # where tokenizer.json lies; None: nothing can be looked up


@dataclass(frozen=True)
class Vision:
    """Encoder of images, whose tensors are kept and never run."""

    layers: int
    hidden: int
    intermediate: int
    patch: int
    downsample: int


@dataclass(frozen=True)
class Drafts:
    """Blocks that draft tokens (DSpark, DeepSeek-V4.1), whose tensors are kept and never run."""

    experts: int
    targets: int  # blocks of the model whose inputs they read
    markov_rank: int


@dataclass(frozen=True)
class ModelConfig:
    """Everything a block needs to know. `raw` is the published config.json, which writers copy."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # each head of q and k is normalised before its rotation
    max_position_embeddings: int = 0
    num_nextn_predict_layers: int = 0
    mla: Mla | None = None
    moe: Moe | None = None
    indexer: Indexer | None = None
    streams: HyperConnections | None = None
    compressed: Compressed | None = None
    entries: SharedEntries | None = None
    engram: Engram | None = None
    vision: Vision | None = None
    drafts: Drafts | None = None
    eos_token_ids: tuple[int, ...] = ()
    names: Names = NAMES

    def is_moe(self, layer: int) -> bool:
        """Whether block `layer` routes its tokens to experts."""
        moe = self.moe
        return moe is not None and layer >= moe.first_dense and layer % moe.layer_freq == 0


class Fields:
    """Typed reading of a config.json that reports a missing or mistyped key as the user's mistake."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config

    def whole(self, name: str, default: int | None = None) -> int:
        """Return an integer; `default` where the key is absent or null, an error where there is none."""
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise DscError(f"config.json: {name} is {str(value)[:80]!r}", "it must be an integer, not negative")
        most = limits.LAYERS if "layers" in name else limits.EXPERTS if "experts" in name else limits.SIZE
        if value > most:
            raise DscError(f"config.json: {name} is above {most}", "no model has as many")
        return value

    def optional(self, name: str) -> int | None:
        """Return an integer or None."""
        return None if self.config.get(name) is None else self.whole(name)

    def number(self, name: str, default: float) -> float:
        """Return a number; `default` where the key is absent or null."""
        value = self.config.get(name)
        value = default if value is None else value
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e300 < value < 1e300:
            raise DscError(f"config.json: {name} is {str(value)[:80]!r}", "it must be a finite number")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.config.get(name)
        if not isinstance(value, bool | None):
            raise DscError(f"config.json: {name} is {str(value)[:80]!r}", "it must be true or false")
        return default if value is None else value

    def text(self, name: str, default: str, allowed: tuple[str, ...]) -> str:
        """One of `allowed`."""
        value = self.config.get(name)
        value = default if value is None else value
        if value not in allowed:
            raise DscError(f"config.json: {name} is {str(value)[:80]!r}", f"supported: {', '.join(allowed)}")
        return str(value)

    def wholes(self, name: str, below: int) -> tuple[int, ...]:
        """Return a list of different integers in rising order, each less than `below`."""
        value = self.config.get(name)
        if not isinstance(value, list) or not all(type(v) is int and v >= 0 for v in value):
            raise DscError(f"config.json: {name} is {str(value)[:80]!r}", "it must be a list of integers, not negative")
        if sorted(set(value)) != value or (value and value[-1] >= below):
            raise DscError(f"config.json: {name} {str(value)[:80]}", f"its numbers must rise and stay below {below}")
        return tuple(value)

    def eos(self) -> tuple[int, ...]:
        """Return the ids that end a text."""
        value = self.config.get("eos_token_id")
        return () if value is None or value == [] else token_ids("config.json: eos_token_id", value)


def token_ids(what: str, value: Any) -> tuple[int, ...]:
    """Return a token id or a list of them. Raises DscError for anything else."""
    found = value if isinstance(value, list) else [value]
    if not found or not all(type(item) is int and 0 <= item < limits.SIZE for item in found):
        raise DscError(f"{what} is {str(value)[:80]!r}", "it must be a token id, or a list of them")
    return tuple(found)


ROPE_KINDS = ("default", "linear", "yarn", "llama3")


def parse_rope(config: Mapping[str, Any], dim: int, interleaved: bool, theta: float = 10000.0) -> Rope:
    """Rotary settings of `config` for `dim` rotated channels."""
    new, old = config.get("rope_parameters"), config.get("rope_scaling")
    given: Mapping[str, Any] = new if isinstance(new, Mapping) else old if isinstance(old, Mapping) else {}
    fields = Fields(given)
    kind = str(given.get("rope_type", given.get("type", "default")))
    if kind not in ROPE_KINDS:
        raise DscError(f"config.json: rope scaling {kind[:80]!r}", f"supported: {', '.join(ROPE_KINDS)}")
    theta = Fields(config).number("rope_theta", theta)
    length = fields.whole("original_max_position_embeddings", 0) or Fields(config).whole("max_position_embeddings", 0)
    factor = given.get("factor")
    if factor is None and kind == "yarn" and length:
        factor = Fields(config).whole("max_position_embeddings", length) / length
    attention_factor = None if given.get("attention_factor") is None else fields.number("attention_factor", 1.0)
    return Rope(
        theta=fields.number("rope_theta", theta),
        dim=dim,
        kind=kind,
        factor=fields.number("factor", 1.0 if factor is None or "factor" in given else factor),
        original_length=length,
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        mscale=fields.number("mscale", 0.0),
        mscale_all_dim=fields.number("mscale_all_dim", 0.0),
        attention_factor=attention_factor,
        truncate=fields.flag("truncate", True),
        low_freq_factor=fields.number("low_freq_factor", 1.0),
        high_freq_factor=fields.number("high_freq_factor", 4.0),
        interleaved=interleaved,
    )

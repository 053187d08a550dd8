"""A family of models: which tensors a checkpoint must have, what they are for, and how a block runs.

The base class is a plain Llama-like decoder; each family overrides what differs. A block is

    hidden -> attention_part -> ffn_input -> (dense | experts) -> ffn_output

and `run_block` is their composition. The pieces stand alone so that a block too large for memory can be run in slices.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional

from deepseek_compress.checkpoint import Header
from deepseek_compress.checkpoint.header import module_of
from deepseek_compress.errors import DscError
from deepseek_compress.models import moe as moe_module
from deepseek_compress.models.cache import KvCache
from deepseek_compress.models.config import NAMES, FfnNames, Fields, Linear, ModelConfig, Names, Role, parse_rope
from deepseek_compress.models.layers import grouped_attention, rms_norm, swiglu
from deepseek_compress.models.weights import Weights

Shape = tuple[int, ...]

MTP = re.compile(r"(^|\.)(enorm|hnorm|eh_proj|shared_head)\b|^mtp\.")
NORM = re.compile(r"norm\.(weight|bias)$")
IGNORED = re.compile(r"rotary_emb\.inv_freq$")  # buffers that old exports stored; never read


class Family:
    """Llama, and the base of the others."""

    model_type: ClassVar[str] = "llama"
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False
    names: ClassVar[Names] = NAMES
    cached: ClassVar[bool] = True  # generation may keep what it knows of earlier tokens
    gathered: ClassVar[frozenset[str]] = frozenset()  # tables of a block too large for memory, read row by row
    kept: ClassVar[str] = ""  # matrices that stay in 16 bits whatever a recipe says, and why

    # -- what the checkpoint says ------------------------------------------------------------------------------------

    def parse(self, config: Mapping[str, Any]) -> ModelConfig:
        """config.json -> ModelConfig. Raises DscError on a missing or unsupported value."""
        fields = Fields(config)
        heads = fields.whole("num_attention_heads")
        hidden = fields.whole("hidden_size")
        if heads == 0 or (fields.optional("head_dim") is None and hidden % heads):
            raise DscError(f"config.json: hidden_size {hidden} does not divide into {heads} heads", "give head_dim")
        if fields.flag("use_sliding_window"):
            raise DscError("config.json: use_sliding_window is true", "models with sliding windows are not supported")
        fields.text("hidden_act", "silu", ("silu",))
        head_dim = fields.whole("head_dim", hidden // heads)
        bias = fields.flag("attention_bias")
        return ModelConfig(
            model_type=self.model_type,
            vocab_size=fields.whole("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.whole("intermediate_size"),
            num_hidden_layers=fields.whole("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=fields.whole("num_key_value_heads", heads),
            head_dim=head_dim,
            rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
            rope=parse_rope(config, head_dim, interleaved=False),
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            qkv_bias=self.qkv_bias or bias,
            o_bias=bias,
            mlp_bias=fields.flag("mlp_bias"),
            qk_norm=self.qk_norm,
            max_position_embeddings=fields.whole("max_position_embeddings", 0),
            eos_token_ids=fields.eos(),
            names=self.names,
        )

    def located(self, cfg: ModelConfig, folder: Path) -> ModelConfig:
        """`cfg` of the checkpoint in `folder`, where running it needs more of its files."""
        return cfg

    def prefix(self, layer: int) -> str:
        """Name of block `layer`, without the last dot."""
        return self.names.block.format(layer)

    def role(self, name: str) -> Role:
        """Return a tensor's role; `name` as in the checkpoint or local to a block."""
        names = self.names
        parts: tuple[tuple[str, Role], ...] = (  # the first that is in the name decides
            (module_of(names.embedding)[0].rpartition(".")[2] + ".", Role.EMBEDDING),
            (module_of(names.head)[0] + ".", Role.HEAD),
            (names.attention_norm + ".", Role.NORM),
            (names.ffn_norm + ".", Role.NORM),
            (".indexer.", Role.INDEXER),
            (module_of(names.ffn.router)[0] + ".", Role.ROUTER),
            (names.ffn.shared + ".", Role.SHARED_EXPERT),
            (names.ffn.experts + ".", Role.EXPERT),
            (names.ffn.mlp + ".", Role.MLP),
            (names.attention + ".", Role.ATTENTION),
        )
        if MTP.search(name):
            return Role.MTP
        if name == names.norm or NORM.search(name):
            return Role.NORM
        for part, role in parts:
            if part in name:
                return role
        raise DscError(f"{name}: not a tensor of {self.model_type}", "check that config.json belongs to these shards")

    # -- which tensors there are -------------------------------------------------------------------------------------

    def tensors(self, cfg: ModelConfig) -> dict[str, Shape]:
        """Every logical tensor a complete checkpoint has, by name, with its shape."""
        found: dict[str, Shape] = {self.names.embedding: (cfg.vocab_size, cfg.hidden_size)}
        for layer in range(cfg.num_hidden_layers):
            for name, shape in self.block_tensors(cfg, layer).items():
                found[f"{self.prefix(layer)}.{name}"] = shape
        found[self.names.norm] = (cfg.hidden_size,)
        if not cfg.tie_word_embeddings:
            found[self.names.head] = (cfg.vocab_size, cfg.hidden_size)
        return {**found, **self.mtp_tensors(cfg), **self.vision_tensors(cfg)}

    def mtp_tensors(self, cfg: ModelConfig) -> dict[str, Shape]:
        """Tensors of the multi-token prediction blocks: all of them are there, or none."""
        return {}

    def vision_tensors(self, cfg: ModelConfig) -> dict[str, Shape]:
        """Tensors that only images need: all of them are there, or none."""
        return {}

    def ignored(self) -> tuple[str, ...]:
        """Patterns of modules that config.json tells servers to leave as they are, see `untouched`."""
        return ()

    def without_drafts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of config.json that say that blocks which draft tokens are not there; None removes one."""
        return {"num_nextn_predict_layers": 0}

    def without_vision(self) -> dict[str, Any]:
        """Keys of config.json that say that images are not understood; None removes one."""
        return {}

    def untouched(self, name: str) -> bool:
        """Whether an output has the very bytes of a tensor, whatever encodings others get."""
        return False

    def drafts(self, header: Header) -> dict[str, Shape]:
        """Tensors of a checkpoint that belong to blocks which draft tokens, whatever their layout."""
        return {}

    def block_tensors(self, cfg: ModelConfig, layer: int) -> dict[str, Shape]:
        """Tensors of one block, by their name within it."""
        found: dict[str, Shape] = {f"{self.names.attention_norm}.weight": (cfg.hidden_size,)}
        found |= self.attention_norms(cfg)
        for linear in self.linears(cfg, layer):
            found[linear.name + ".weight"] = (linear.rows, linear.columns)
            if self.has_bias(cfg, linear.name):
                found[linear.name + ".bias"] = (linear.rows,)
        found[f"{self.names.ffn_norm}.weight"] = (cfg.hidden_size,)
        return found

    def attention_norms(self, cfg: ModelConfig) -> dict[str, Shape]:
        """Tensors of the attention that no linear owns."""
        norms = (self.names.q_norm, self.names.k_norm) if cfg.qk_norm else ()
        return {f"{name}.weight": (cfg.head_dim,) for name in norms}

    def has_bias(self, cfg: ModelConfig, name: str) -> bool:
        """Whether the linear `name` of a block has a bias."""
        if name.startswith(self.names.attention + "."):
            return cfg.o_bias if name == self.names.o else cfg.qkv_bias
        return cfg.mlp_bias

    def linears(self, cfg: ModelConfig, layer: int) -> list[Linear]:
        """List the linears of a block in the order in which they run; not the router, which is never changed."""
        return [
            *self.attention_linears(cfg, layer),
            *mlp_linears(self.names.ffn, self.names.ffn.mlp, Role.MLP, cfg.hidden_size, cfg.intermediate_size),
        ]

    def attention_linears(self, cfg: ModelConfig, layer: int) -> list[Linear]:
        """List the linears of the attention, in order."""
        hidden, dim = cfg.hidden_size, cfg.head_dim
        kv = cfg.num_key_value_heads * dim
        names, source = self.names, f"{self.names.attention}.in"
        sizes = {names.q: cfg.num_attention_heads * dim, names.k: kv, names.v: kv}
        found = [attention_linear(name, rows, hidden, source, "qkv") for name, rows in sizes.items()]
        return [*found, attention_linear(names.o, hidden, cfg.num_attention_heads * dim)]

    def problems(self, header: Header) -> list[DscError]:
        """Every missing, unknown and misshaped tensor of a checkpoint."""
        try:
            cfg = self.parse(header.config)
            blocks = sum(cfg.is_moe(layer) for layer in range(cfg.num_hidden_layers))
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:  # of a mistyped value
            return [DscError(f"config.json: {str(error)[:200]}", "download the file again")]
        experts = cfg.moe.experts if cfg.moe else 0
        least = cfg.num_hidden_layers + blocks * experts  # before their names are made
        if least > 2 * len(header.tensors) + 1000:
            what = f"config.json: {cfg.num_hidden_layers} layers, {experts} experts in {blocks} of them"
            return [DscError(f"{what}: {len(header.tensors)} tensors", "config.json and shards do not belong together")]
        expected = self.tensors(cfg)
        given = {name: info for name, info in header.tensors.items() if not IGNORED.search(name)}
        for group in (self.mtp_tensors(cfg), self.vision_tensors(cfg)):
            if not any(name in given for name in group):
                expected = {name: shape for name, shape in expected.items() if name not in group}
        optional = {self.names.head} if cfg.tie_word_embeddings else set()
        return [*_missing(expected, given), *_unknown(given, expected, optional), *_misshaped(expected, given)]

    # -- how a block runs --------------------------------------------------------------------------------------------

    def embed(self, cfg: ModelConfig, embedding: Tensor, tokens: Tensor) -> Tensor:
        """tokens (B, T) -> hidden (B, T, hidden_size)."""
        return functional.embedding(tokens, embedding)

    def residual(self, cfg: ModelConfig, hidden: Tensor) -> Tensor:
        """Map a block's output (B, T, *row_shape) to its residual stream or streams, on which errors are measured."""
        return hidden

    def chooses(self, cfg: ModelConfig, layer: int) -> bool:
        """Whether block `layer` chooses which entries its queries see."""
        return False

    def choice(self, cfg: ModelConfig, layer: int, hidden: Tensor) -> Tensor | None:
        """Which entries the queries of block `layer` see, int64 (B, T, K), rising, -1 for none, from what it gives.

        None where the block does not choose.
        """
        return None

    def final_hidden(self, cfg: ModelConfig, weights: Weights, hidden: Tensor) -> Tensor:
        """Map the last block's output to the head's input (B, T, hidden_size). `weights` has checkpoint names."""
        return rms_norm(hidden, weights[self.names.norm], cfg.rms_norm_eps)

    attention = staticmethod(grouped_attention)  # normed x (B, T, hidden_size) -> what it adds, the same shape

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
        """hidden -> hidden with what attention adds."""
        x = rms_norm(hidden, weights[f"{self.names.attention_norm}.weight"], cfg.rms_norm_eps)
        return hidden + self.attention(cfg, layer, weights, x, positions, mask, cache)

    def ffn_input(self, cfg: ModelConfig, layer: int, weights: Weights, hidden: Tensor) -> Tensor:
        """hidden after attention -> input of the MLP or the experts (B, T, hidden_size)."""
        return rms_norm(hidden, weights[f"{self.names.ffn_norm}.weight"], cfg.rms_norm_eps)

    def ffn_output(self, cfg: ModelConfig, layer: int, weights: Weights, hidden: Tensor, added: Tensor) -> Tensor:
        """hidden after attention, and what the MLP or the experts add -> hidden of the next block."""
        return hidden + added

    def run_block(
        self,
        cfg: ModelConfig,
        layer: int,
        weights: Weights,
        hidden: Tensor,
        positions: Tensor,
        mask: Tensor | None = None,
        cache: KvCache | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """One decoder block: hidden (B, T, hidden_size) -> the same shape. Inputs are not modified.

        `positions` (B, T) integers; `mask` additive (B, 1, T, S) or None for causal; `tokens` (B, T) only for
        blocks that are routed by token id.
        """
        hidden = self.attention_part(cfg, layer, weights, hidden, positions, mask, cache)
        x = self.ffn_input(cfg, layer, weights, hidden)
        if cfg.moe is not None and cfg.is_moe(layer):
            added = moe_module.moe_part(cfg.moe, weights, x, tokens)
        else:
            added = swiglu(weights, self.names.ffn.mlp, x, names=self.names.ffn)
        return self.ffn_output(cfg, layer, weights, hidden, added)


def attention_linear(name: str, rows: int, columns: int, source: str = "", fused: str | None = None) -> Linear:
    """Describe a linear of the attention; without `source` it shares its input with no other."""
    return Linear(name, Role.ATTENTION, rows, columns, source or name, fused)


def mlp_linears(names: FfnNames, name: str, role: Role, hidden: int, intermediate: int) -> list[Linear]:
    """gate, up and down of one MLP or expert."""
    source, shared = f"{name}.in", "experts" if role is Role.EXPERT else None
    return [
        Linear(f"{name}.{names.gate}", role, intermediate, hidden, source, shared or "gate_up"),
        Linear(f"{name}.{names.up}", role, intermediate, hidden, source, shared or "gate_up"),
        Linear(f"{name}.{names.down}", role, hidden, intermediate, f"{name}.{names.down}", shared),
    ]


def _missing(expected: Mapping[str, Shape], given: Mapping[str, Any]) -> Iterator[DscError]:
    for name in expected:
        if name not in given:
            yield DscError(f"{name}: missing from the checkpoint", "download the shard that holds it again")


def _unknown(given: Mapping[str, Any], expected: Mapping[str, Shape], optional: set[str]) -> Iterator[DscError]:
    for name in given:
        if name not in expected and name not in optional:
            yield DscError(f"{name}: not a tensor of this model", "check that config.json belongs to these shards")


def _misshaped(expected: Mapping[str, Shape], given: Mapping[str, Any]) -> Iterator[DscError]:
    for name, shape in expected.items():
        if name in given and tuple(given[name].shape) != shape:
            found = tuple(given[name].shape)
            yield DscError(f"{name}: shape {found}, config.json asks for {shape}", "check that they belong together")

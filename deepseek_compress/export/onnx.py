"""A checkpoint as one ONNX graph for prefill and decode.

| input | shape | |
|---|---|---|
| input_ids | int64 (batch, new) | |
| attention_mask | int64 (batch, total) | 1 for a token, 0 for padding; total = past + new |
| position_ids | int64 (batch, new) | |
| past.L.latent, past.L.rope | (batch, past, kv_lora_rank), (batch, past, rope) | latent attention; past may be 0 |
| past.L.index | (batch, past, index_head_dim) | the keys of DeepSeek-V3.2's indexer |
| past.L.key, past.L.value | (batch, key heads, past, head_dim) | grouped-query attention |
| past.L.key, past.L.entries, ... | see `compressed` | DeepSeek-V4; with padding its logits are NaN |

Outputs: logits float32 (batch, new, vocabulary) and present.L.*, which are the next step's past.L.*. Calls may take the
tokens in any pieces; only onnxruntime's GroupQueryAttention (target `onnxruntime`: Llama, Qwen2, Qwen3) wants one token
a row, or one row, in every call after the first.

The graph is written from the configuration, not traced: all experts are there whatever the sample, and a tensor keeps
its name in the checkpoint, so that a value in the engine can be followed back to the file it came from.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.checkpoint.header import module_of
from deepseek_compress.errors import DscError
from deepseek_compress.export.build import Build, Weight
from deepseek_compress.export.compressed import compressed_attention
from deepseek_compress.export.graph import CONTRIB, Graph
from deepseek_compress.export.lowering import LOWERINGS, float_weight, is_quantized, linear, nbits_product, nbits_weight
from deepseek_compress.export.moe import moe_part
from deepseek_compress.export.pieces import grouped_attention, latent_attention, rms_norm, swiglu
from deepseek_compress.export.streams import around, last_collapse, spread
from deepseek_compress.models import Architecture
from deepseek_compress.models.activations import input_scheme
from deepseek_compress.models.config import Compressed, HyperConnections, Indexer, Mla, ModelConfig, Moe, Rope
from deepseek_compress.numerics import WEIGHTS
from deepseek_compress.numerics.activations import SMALLEST, Dynamic, InputGrid
from deepseek_compress.numerics.grid import fit_group_size
from deepseek_compress.numerics.types import Quantized, Statistics

WORDS = {"entries": "entries that blocks share", "engram": "Engram"}  # DeepSeek-V4.1
SCORES, METHODS = ("softmax", "sigmoid", "sqrtsoftplus"), ("greedy", "group_limited_greedy", "noaux_tc")
READ = {  # fields of a configuration that the emitters, or the runtime's functions they call, compute with
    ModelConfig: frozenset(
        "model_type vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
        "head_dim rms_norm_eps rope tie_word_embeddings qkv_bias o_bias mlp_bias qk_norm max_position_embeddings "
        "num_nextn_predict_layers mla moe indexer streams compressed eos_token_ids names".split()
    ),
    Rope: frozenset(
        "theta dim kind factor original_length beta_fast beta_slow mscale mscale_all_dim attention_factor truncate "
        "low_freq_factor high_freq_factor interleaved".split()
    ),
    Mla: frozenset("q_lora_rank kv_lora_rank nope rope value".split()),
    Moe: frozenset(
        "experts shared top_k intermediate first_dense layer_freq groups top_groups method scoring normalize "
        "scaling swiglu_limit hash_layers names".split()
    ),
    Indexer: frozenset("heads head_dim top_k".split()),
    HyperConnections: frozenset("streams sinkhorn_iterations eps".split()),
    Compressed: frozenset("rates overlapping window q_lora_rank o_groups o_lora_rank rope_window".split()),
}
ROWS_AT_ONCE = 4096  # of a table that is rounded


def export_onnx(
    checkpoint: Checkpoint,
    path: Path,
    lowering: str = "plain",
    *,
    dtype: str = "float32",
    accuracy_level: int = 4,
    embedding_bits: int = 16,
    last_only: bool = False,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write `path` and `path`.data; returns facts: bytes, nodes, initializers.

    `lowering` is one of `LOWERINGS`, `dtype` the float type of activations, `accuracy_level` that of MatMulNBits (4: a
    16-bit head of a packed model is rounded to 8 bits when the file is loaded). `embedding_bits` 8 stores embedding and
    head in groups of 8-bit codes (onnxruntime only). `last_only`: logits of the last token of a call alone, (batch, 1,
    vocabulary), which is what serving needs of a prompt.
    Raises `DscError` for a family or a layer that has no emitter here.
    """
    architecture = Architecture.of(checkpoint)
    cfg = architecture.cfg
    check_supported(cfg, lowering)
    if lowering not in LOWERINGS:
        raise DscError(f"unknown lowering {lowering!r}", f"use one of {', '.join(LOWERINGS)}")
    if embedding_bits not in (8, 16) or (embedding_bits == 8 and lowering != "matmulnbits"):
        raise DscError(f"embedding of {embedding_bits} bits with {lowering}", "use 16, or 8 with target onnxruntime")
    bits, rounded, inputs = rounded_inputs(architecture)
    with Graph(path, dtype) as graph:
        build = Build(
            graph,
            checkpoint,
            cfg,
            LOWERINGS[lowering],
            accuracy_level=accuracy_level,
            embedding_bits=embedding_bits,
            last_only=last_only,
            contrib=lowering == "matmulnbits",
            activation_bits=bits,
            rounded=rounded,
            inputs=inputs,
            attention8=bool((checkpoint.activations or {}).get("attention")),
            unsigned=lowering != "tensorrt",
        )
        emit_model(build)
        about = {"lowering": lowering, "dtype": dtype, "activations": json.dumps(checkpoint.manifest_activations)}
        graph.save({**about, **(metadata or {})})
        return {"bytes": graph.bytes, "nodes": graph.count, "tensors": graph.tensors}


def rounded_inputs(architecture: Architecture) -> tuple[int, frozenset[str], Mapping[str, InputGrid]]:
    """Bits of the activations, the linears (by checkpoint name) whose inputs are rounded to them, and static grids.

    Raises `DscError` for a scheme that no lowering computes.
    """
    checkpoint = architecture.source
    scheme = input_scheme(checkpoint.activations)
    if scheme is None:
        return 8, frozenset(), {}
    if scheme.inputs:
        return 8, frozenset(scheme.inputs), scheme.inputs
    if not isinstance(scheme.quantize, Dynamic) or not scheme.quantize.symmetric:
        what = f"activations {checkpoint.activations} have no ONNX form here"
        raise DscError(what, "use dynamic: {symmetric: true}, or static")
    return scheme.quantize.num_bits, frozenset(name for name, _ in architecture.linears(scheme.roles)), {}


def check_supported(cfg: ModelConfig, lowering: str) -> None:
    """Raise `DscError` unless every feature of the configuration is one that the emitters know.

    What they read is listed (`READ`); any other field must have the value that means it is not used.
    """
    fix = "export compressed-tensors and serve with vLLM"
    kinds = cfg.compressed
    parts = (cfg, cfg.rope, cfg.mla, cfg.moe, cfg.indexer, cfg.streams, kinds, kinds and kinds.rope_window)
    for part in parts:
        for field in () if part is None else fields(part):
            value, unused = getattr(part, field.name), field.default
            if field.name not in READ[type(part)] and value != unused:
                what = WORDS.get(field.name, f"{field.name} {value!r}")
                raise DscError(f"{cfg.model_type}: {what}: this has no ONNX form here", fix)
    if lowering == "tensorrt" and kinds is not None:
        what = f"{cfg.model_type}: a cache whose entries hold several tokens fits no profile of a TensorRT engine here"
        raise DscError(what, "use target onnx or onnxruntime")
    if cfg.moe is not None and (cfg.moe.scoring not in SCORES or cfg.moe.method not in METHODS):
        raise DscError(f"{cfg.model_type}: this router has no ONNX form here", fix)


def emit_model(build: Build) -> None:
    """Embedding, blocks, head."""
    g, cfg = build.graph, build.cfg
    g.input("input_ids", TensorProto.INT64, ["batch", "new"])
    g.input("attention_mask", TensorProto.INT64, ["batch", "total"])
    g.input("position_ids", TensorProto.INT64, ["batch", "new"])
    x = embed(build)
    for layer in range(cfg.num_hidden_layers):
        x = emit_block(build, layer, x)
    lengths = g.op("Shape", "input_ids")
    if build.last_only:
        x = g.op("Reshape", x, g.op("Concat", lengths, g.ints(-1), axis=0))
        x = g.op("Gather", x, g.constant(np.array(-1, np.int64)), axis=1)
        lengths = g.op("Concat", g.op("Slice", lengths, g.ints(0), g.ints(1)), g.ints(1), axis=0)
    x = x if cfg.streams is None else last_collapse(build, cfg.streams, x)
    logits = head(build, rms_norm(build, module_of(cfg.names.norm)[0], x, cfg.rms_norm_eps))
    logits = _without_padding(build, g.op("Cast", logits, to=TensorProto.FLOAT))
    shape = g.op("Concat", lengths, g.ints(cfg.vocab_size), axis=0)
    logits = g.op("Reshape", logits, shape, named="logits")
    g.output(logits, TensorProto.FLOAT, ["batch", 1 if build.last_only else "new", cfg.vocab_size], first=True)


def _without_padding(build: Build, logits: str) -> str:
    """NaN for a batch with padding where entries hold several tokens: they begin where the rows do."""
    g = build.graph
    if build.cfg.compressed is None:
        return logits
    real = g.op("Greater", g.op("ReduceMin", "attention_mask", keepdims=0), g.constant(np.array(0, np.int64)))
    return g.op("Where", real, logits, g.scalar(np.nan, np.float32))


def emit_block(build: Build, layer: int, x: str) -> str:
    """One decoder block: x (tokens, hidden) -> (tokens, hidden); of several streams (tokens, streams hidden)."""
    g, cfg, names = build.graph, build.cfg, build.cfg.names
    stem = names.block.format(layer)
    if cfg.streams is not None:
        return _emit_streams(build, cfg.streams, layer, stem, x)
    y = rms_norm(build, f"{stem}.{names.attention_norm}", x, cfg.rms_norm_eps)
    with g.scope(f"{stem}.{names.attention}"):
        if cfg.mla is not None:
            y = latent_attention(build, cfg.mla, layer, stem, y)
        else:
            y = grouped_attention(build, layer, stem, y)
    x = g.op("Add", x, y)
    y = rms_norm(build, f"{stem}.{names.ffn_norm}", x, cfg.rms_norm_eps)
    with g.scope(f"{stem}.{names.ffn.mlp}"):
        if cfg.moe is not None and cfg.is_moe(layer):
            y = moe_part(build, cfg.moe, stem, y)
        else:
            y = swiglu(build, f"{stem}.{names.ffn.mlp}", y)
    return g.op("Add", x, y, named=hidden_name(layer + 1))


def _emit_streams(build: Build, hyper: HyperConnections, layer: int, stem: str, x: str) -> str:
    """Emit a block of DeepSeek-V4."""
    g, cfg = build.graph, build.cfg
    kinds, moe = cfg.compressed, cfg.moe
    assert kinds is not None and moe is not None  # the family's parser gives both

    def attention(y: str) -> str:
        with g.scope(f"{stem}.{cfg.names.attention}"):
            return compressed_attention(build, kinds, layer, stem, y)

    def experts(y: str) -> str:
        with g.scope(f"{stem}.{cfg.names.ffn.mlp}"):
            return moe_part(build, moe, stem, y)

    x = around(build, hyper, f"{stem}.hc_attn", f"{stem}.{cfg.names.attention_norm}", x, attention)
    x = around(build, hyper, f"{stem}.hc_ffn", f"{stem}.{cfg.names.ffn_norm}", x, experts)
    return g.op("Identity", x, named=hidden_name(layer + 1))


def hidden_name(layer: int) -> str:
    """Return the graph's name for the input of block `layer`; one more is the last block's output."""
    return f"hidden/{layer}"


def embed(build: Build) -> str:
    """(B, S) tokens -> (B S, hidden), or that many equal streams side by side."""
    g, name = build.graph, module_of(build.cfg.names.embedding)[0]
    if build.embedding_bits == 8:
        table, scale, zero = nbits_weight(build, f"{name}.weight", rounded_table(build.checkpoint, name))
        flat = g.op("Reshape", table, g.ints(0, -1))
        size = fit_group_size(build.cfg.hidden_size, None)
        knobs: dict[str, Any] = {"bits": 8, "block_size": size, "gather_axis": 0, "quantize_axis": 1}
        x = g.op("GatherBlockQuantized", flat, "input_ids", scale, zero, domain=CONTRIB, **knobs)
    else:
        weight = float_weight(build, Weight(name, (name,)), cast=False)
        x = g.op("Gather", weight, "input_ids", axis=0)
        x = x if g.type_of(weight) == g.elem_type else g.op("Cast", x, to=g.elem_type)
    several = build.cfg.streams is not None
    x = g.op("Reshape", x, g.ints(-1, build.cfg.hidden_size), named="" if several else hidden_name(0))
    return spread(build, x, hidden_name(0))


def head(build: Build, x: str) -> str:
    """(tokens, hidden) -> (tokens, vocabulary). A tied head is the embedding table, stored once."""
    tied, names = build.cfg.tie_word_embeddings, build.cfg.names
    name = module_of(names.embedding if tied else names.head)[0]
    if build.embedding_bits == 8:
        return nbits_product(build, x, f"{name}.weight", rounded_table(build.checkpoint, name))
    weight = Weight(name, (name,))
    if _in_integers(build) and not is_quantized(build, weight):
        return _rounded_head(build, x, weight)
    if tied:
        return build.graph.op("Gemm", x, float_weight(build, weight), transB=1)
    return linear(build, name, x)


def _in_integers(build: Build) -> bool:
    """Whether onnxruntime computes the packed linears with 8-bit activations."""
    packed = any(info.encoding == "packed" for info in build.checkpoint.header.tensors.values())
    return build.contrib and build.accuracy_level == 4 and packed


def _rounded_head(build: Build, x: str, weight: Weight) -> str:
    """x . W^T with 8-bit codes that onnxruntime makes once, at load, from the 16-bit table the file holds.

    A head in FP32 costs as much memory traffic as all 4-bit linears of a small model together. Symmetric groups of
    the hidden size's divisor; constant folding leaves the codes alone.
    """
    g, cfg = build.graph, build.cfg
    size = fit_group_size(cfg.hidden_size, None)
    with g.scope(weight.label):
        groups = g.op("Reshape", float_weight(build, weight), g.ints(cfg.vocab_size, -1, size))
        largest = g.op("ReduceMax", g.op("Abs", groups), g.ints(-1), keepdims=1)
        scale = g.op("Max", g.op("Div", largest, g.scalar(127)), g.scalar(SMALLEST))
        codes = g.op("Add", g.op("Round", g.op("Div", groups, scale)), g.scalar(128))
        codes = g.op("Cast", codes, to=TensorProto.UINT8)
        return g.op(
            "MatMulNBits", x, codes, g.op("Squeeze", scale, g.ints(-1)), domain=CONTRIB,
            K=cfg.hidden_size, N=cfg.vocab_size, bits=8, block_size=size, accuracy_level=4,
        )  # fmt: skip


def rounded_table(checkpoint: Checkpoint, name: str) -> Quantized:
    """Round the table `name` to a grid of 8 bits per group, few rows at a time: rows do not meet.

    One that the checkpoint holds on such a grid stays as it is.
    """
    if (packed := packed_table(checkpoint, name)) is not None:
        return packed
    plain = checkpoint.header.tensors[f"{name}.weight"].encoding == "plain"
    table = checkpoint.read(f"{name}.weight", None if plain else torch.float32)
    starts = range(0, len(table), ROWS_AT_ONCE)
    parts = [_in_8_bits(table[start : start + ROWS_AT_ONCE]) for start in starts]
    return Quantized(
        torch.cat([part.codes for part in parts]),
        torch.cat([part.scale for part in parts]),
        torch.cat([part.zero_point for part in parts]),
        num_bits=8,
    )


def packed_table(checkpoint: Checkpoint, name: str) -> Quantized | None:
    """Return the table `name`, if the checkpoint holds it on the grid that `rounded_table` would round it to."""
    packed = checkpoint.read_quantized(f"{name}.weight")
    fits = (
        packed is not None and packed.num_bits == 8 and packed.group_size == fit_group_size(packed.codes.shape[1], None)
    )
    return packed if fits else None


def rounded_to_8(rows: Tensor) -> Tensor:
    """Rows of such a table, float32, as the file has them."""
    return _in_8_bits(rows).dequantize()


def _in_8_bits(rows: Tensor) -> Quantized:
    return WEIGHTS["rtn"](num_bits=8, group_size=None)(rows.float(), Statistics())

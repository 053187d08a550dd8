"""One emitter for each piece of a decoder block. B batch, S new tokens, P past, T = P + S, H heads; activations between
the pieces are (B S, hidden): linears see two dimensions and only attention knows which token is whose.

The mathematics is that of `models` (same order, same rounding where the type is float32); the cache differs: latent
attention keeps the normed latent and the one rotated key, (B, T, kv_lora_rank) and (B, T, rope), as the paper has it,
and expands them in each step. Left out: the absorbed form of latent attention, which saves that expansion.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from deepseek_compress.export.build import Build
from deepseek_compress.export.graph import CONTRIB, DOMAIN, OPSET, Graph
from deepseek_compress.export.lowering import attention_product, linear, to_numpy
from deepseek_compress.export.sparse import choose
from deepseek_compress.models.config import Mla, Rope
from deepseek_compress.models.mla import INDEX_EPS, LATENT_EPS
from deepseek_compress.models.rope import frequencies, softmax_scale

SOFTMAX = "RowSoftmax"


def row_softmax(elem_type: int) -> onnx.FunctionProto:
    """Our softmax as a model-local function: RowSoftmax(scores, mask) over the last dimension.

    Maximum and sum in FP32; where `mask` is false the share is 0, and a row without any true entry is all zeros.
    TensorRT-RTX fuses the body into one kernel; full TensorRT may put a plugin of the same name in its place.
    """
    node = helper.make_node
    nodes = [
        node("Cast", ["scores"], ["wide"], to=TensorProto.FLOAT),
        node("Constant", [], ["last"], value_ints=[-1]),
        node("Constant", [], ["lowest"], value_float=float(np.finfo(np.float32).min)),
        node("Constant", [], ["tiny"], value_float=1e-30),
        node("Constant", [], ["nothing"], value_float=0.0),
        node("Where", ["mask", "wide", "lowest"], ["seen"]),
        node("ReduceMax", ["seen", "last"], ["top"], keepdims=1),
        node("Sub", ["seen", "top"], ["below"]),
        node("Exp", ["below"], ["raised"]),
        node("Where", ["mask", "raised", "nothing"], ["kept"]),
        node("ReduceSum", ["kept", "last"], ["sum"], keepdims=1),
        node("Max", ["sum", "tiny"], ["total"]),
        node("Div", ["kept", "total"], ["share"]),
        node("Cast", ["share"], ["out"], to=elem_type),
    ]
    return helper.make_function(DOMAIN, SOFTMAX, ["scores", "mask"], ["out"], nodes, [helper.make_opsetid("", OPSET)])


def rms_norm(build: Build, name: str, x: str, eps: float) -> str:
    """x / sqrt(mean(x^2) + eps) in FP32, then times the weight `name`, over the last dimension."""
    g = build.graph
    with g.scope(name):
        y = unit(build, x, eps)
        weight = to_numpy(build.checkpoint.read(f"{name}.weight")).astype(g.numpy)
        return g.op("Mul", y, g.weight(f"{name}.weight", weight))


def unit(build: Build, x: str, eps: float, wide: bool = False) -> str:
    """x / sqrt(mean(x^2) + eps) over the last dimension, computed in FP32; `wide`: and left so."""
    g = build.graph
    values = g.op("Cast", x, to=TensorProto.FLOAT) if g.dtype != "float32" else x
    mean = g.op("ReduceMean", g.op("Pow", values, g.scalar(2, np.float32)), g.ints(-1), keepdims=1)
    y = g.op("Div", values, g.op("Sqrt", g.op("Add", mean, g.scalar(eps, np.float32))))
    return g.op("Cast", y, to=g.elem_type) if g.dtype != "float32" and not wide else y


def swiglu(build: Build, stem: str, x: str) -> str:
    """down(silu(gate(x)) * up(x))."""
    names = build.cfg.names.ffn
    product = gated(build, linear(build, f"{stem}.{names.gate}", x), linear(build, f"{stem}.{names.up}", x))
    return linear(build, f"{stem}.{names.down}", product)


def gated(build: Build, gate: str, up: str) -> str:
    """silu(gate) * up; where the experts have a limit, gate is clipped above and up on both sides."""
    g, limit = build.graph, build.cfg.moe.swiglu_limit if build.cfg.moe else None
    if limit is not None:
        gate, up = g.op("Min", gate, g.scalar(limit)), g.op("Max", g.op("Min", up, g.scalar(limit)), g.scalar(-limit))
    return g.op("Mul", g.op("Mul", gate, g.op("Sigmoid", gate)), up)


# ---- attention


def steps(build: Build) -> str:
    """int64 (2,): B and S."""
    return build.graph.op("Shape", "input_ids")


def _seen(build: Build) -> str:
    return build.graph.op("Shape", "attention_mask")  # (B, T)


def unflatten(build: Build, x: str, lengths: str, *rest: int) -> str:
    """(B L, ...) -> (B, L, *rest), where `lengths` holds (B, L)."""
    g = build.graph
    return g.op("Reshape", x, g.op("Concat", lengths, g.ints(*rest), axis=0))


def causal_mask(build: Build) -> str:
    """bool (B, 1, S, T): no later token, no padding. Shared by all blocks."""
    g = build.graph
    new = g.op("Gather", steps(build), g.constant(np.array(1, np.int64)))
    seen = g.op("Gather", _seen(build), g.constant(np.array(1, np.int64)))
    zero, one = (g.constant(np.array(v, np.int64)) for v in (0, 1))
    query = g.op("Add", g.op("Range", zero, new, one), g.op("Sub", seen, new))
    early = g.op("LessOrEqual", g.op("Range", zero, seen, one), g.op("Unsqueeze", query, g.ints(1)))  # (S, T)
    real = g.op("Greater", g.op("Unsqueeze", "attention_mask", g.ints(1, 2)), zero)  # (B, 1, 1, T)
    return g.op("And", early, real)


def rotate(build: Build, x: str) -> str:
    """Rotate the pairs of x (B, S, heads, rope) by `position_ids`; halves come out as in models.rope.rotate."""
    g, rope = build.graph, build.cfg.rope
    cos, sin = turns(build, g.op("Unsqueeze", "position_ids", g.ints(2, 3)), rope)  # (B, S, 1, rope / 2)
    half = rope.dim // 2
    if rope.interleaved:
        first, second = (g.op("Slice", x, g.ints(start), g.ints(rope.dim), g.ints(-1), g.ints(2)) for start in (0, 1))
    else:
        first, second = g.ops("Split", x, g.ints(half, half), count=2, axis=-1)
    return g.op("Concat", *rotated(build, first, second, cos, sin), axis=-1)


def rotated(build: Build, first: str, second: str, cos: str, sin: str) -> tuple[str, str]:
    """Rotate pairs of channels, given as two halves, each pair by its angle."""
    g = build.graph
    return (
        g.op("Sub", g.op("Mul", first, cos), g.op("Mul", second, sin)),
        g.op("Add", g.op("Mul", second, cos), g.op("Mul", first, sin)),
    )


def turns(build: Build, positions: str, rope: Rope) -> tuple[str, str]:
    """Cosine and sine of int64 positions (..., 1) by channel pair, (..., rope / 2), with the scaling's factor."""
    g = build.graph
    angle, factor = frequencies(rope)
    angles = g.op("Mul", g.op("Cast", positions, to=TensorProto.FLOAT), g.constant(angle.numpy()))
    cos, sin = (
        g.op("Cast", g.op("Mul", g.op(kind, angles), g.scalar(factor, np.float32)), to=g.elem_type)
        for kind in ("Cos", "Sin")
    )
    return cos, sin


class RowMask(NamedTuple):
    """Which columns a query may see."""

    seen: str  # bool (B, 1, S, T)

    def bias(self, g: Graph) -> str:
        """Return the mask as an additive bias of scores: 0, or a value that no score outweighs."""
        return g.op("Where", self.seen, g.scalar(0), g.scalar(-1e30 if g.dtype != "float16" else -6e4))


def attention_weights(build: Build, scores: str, mask: RowMask) -> str:
    """Softmax of the scores (B, H, S, T) of what is seen."""
    g = build.graph
    if build.contrib:
        return g.op("Softmax", g.op("Add", scores, mask.bias(g)), axis=-1)  # one pass over the row
    g.function(row_softmax(g.elem_type))
    return g.op(SOFTMAX, scores, mask.seen, domain=DOMAIN)


def _real(build: Build, values: str) -> str:
    """values (B, heads, T, channels), where they are rounded with those of padding at 0: it has no say in a scale."""
    g = build.graph
    if not build.attention8:
        return values
    real = g.op("Greater", g.op("Unsqueeze", "attention_mask", g.ints(1, 3)), g.constant(np.array(0, np.int64)))
    return g.op("Where", real, values, g.scalar(0))


def _remember(build: Build, layer: int, part: str, new: str, axis: int, shape: tuple[int, ...]) -> str:
    """Append `new` to the cache input past.LAYER.PART along `axis`; the result is the output present.LAYER.PART."""
    g = build.graph

    def dims(length: str) -> list[int | str]:
        return ["batch", *shape[: axis - 1], length, *shape[axis - 1 :]]

    past = g.input(f"past.{layer}.{part}", g.elem_type, dims("past"))
    every = g.op("Concat", past, new, axis=axis, named=f"present.{layer}.{part}")
    return g.output(every, g.elem_type, dims("total"))


def _queries(build: Build, mla: Mla, stem: str, x: str) -> tuple[str, str]:
    """Return the query latent, or x where there is none, and the queries (B S, heads (nope + rope))."""
    names = build.cfg.names
    if mla.q_lora_rank is None:
        return x, linear(build, f"{stem}.{names.q}", x)
    latent = rms_norm(build, f"{stem}.{names.q_a_norm}", linear(build, f"{stem}.{names.q_a}", x), LATENT_EPS)
    return latent, linear(build, f"{stem}.{names.q_b}", latent)


def latent_attention(build: Build, mla: Mla, layer: int, stem: str, x: str) -> str:
    """Multi-head latent attention (DeepSeek-V2, section 2.1): x (B S, hidden) -> (B S, hidden)."""
    g, heads = build.graph, build.cfg.num_attention_heads
    scale = g.scalar(softmax_scale(build.cfg.rope, mla.nope + mla.rope))
    q_latent, q = _queries(build, mla, stem, x)
    q = unflatten(build, q, steps(build), heads, mla.nope + mla.rope)
    q_nope, q_rope = g.ops("Split", q, g.ints(mla.nope, mla.rope), count=2, axis=-1)
    q_rope = rotate(build, q_rope)
    q_nope, q_rope = (g.op("Mul", g.op("Transpose", part, perm=[0, 2, 1, 3]), scale) for part in (q_nope, q_rope))

    kv = linear(build, f"{stem}.{build.cfg.names.kv_a}", x)
    latent, k_rope = g.ops("Split", kv, g.ints(mla.kv_lora_rank, mla.rope), count=2, axis=-1)
    latent = rms_norm(build, f"{stem}.{build.cfg.names.kv_a_norm}", latent, LATENT_EPS)
    latent = unflatten(build, latent, steps(build), mla.kv_lora_rank)
    k_rope = g.op("Squeeze", rotate(build, unflatten(build, k_rope, steps(build), 1, mla.rope)), g.ints(2))
    latent = _remember(build, layer, "latent", latent, 1, (mla.kv_lora_rank,))  # (B, T, kv_lora_rank)
    k_rope = _remember(build, layer, "rope", k_rope, 1, (mla.rope,))  # (B, T, rope)

    expanded = linear(build, f"{stem}.{build.cfg.names.kv_b}", g.op("Reshape", latent, g.ints(-1, mla.kv_lora_rank)))
    expanded = unflatten(build, expanded, _seen(build), heads, mla.nope + mla.value)
    k_nope, v = g.ops("Split", expanded, g.ints(mla.nope, mla.value), count=2, axis=-1)
    if build.attention8:  # one scale for both parts of a token
        q, k_rope = g.op("Concat", q_nope, q_rope, axis=-1), g.op("Unsqueeze", k_rope, g.ints(2))
        k = g.op("Concat", k_nope, g.op("Expand", k_rope, g.ints(1, 1, heads, 1)), axis=-1)
        scores = attention_product(build, q, g.op("Transpose", k, perm=[0, 2, 3, 1]))
    else:
        scores = g.op(
            "Add",
            g.op("MatMul", q_nope, g.op("Transpose", k_nope, perm=[0, 2, 3, 1])),
            g.op("MatMul", q_rope, g.op("Unsqueeze", g.op("Transpose", k_rope, perm=[0, 2, 1]), g.ints(1))),
        )
    v = _real(build, g.op("Transpose", v, perm=[0, 2, 1, 3]))
    mask = RowMask(_indexed(build, layer, stem, x, q_latent))
    out = attention_product(build, attention_weights(build, scores, mask), v, nonnegative=True)
    out = g.op("Reshape", g.op("Transpose", out, perm=[0, 2, 1, 3]), g.ints(-1, heads * mla.value))
    return linear(build, f"{stem}.{build.cfg.names.o}", out)


def _indexed(build: Build, layer: int, stem: str, x: str, q_latent: str) -> str:
    """bool (B, 1, S, T): what is open to a query, of it what the indexer chose where the model has one."""
    g, indexer = build.graph, build.cfg.indexer
    if indexer is None:
        return causal_mask(build)
    name = f"{stem}.{build.cfg.names.attention}.indexer"
    keys = _layer_norm(build, f"{name}.k_norm", linear(build, f"{name}.wk", x), INDEX_EPS)
    keys = _rotate_front(build, unflatten(build, keys, steps(build), 1, indexer.head_dim))
    keys = _remember(build, layer, "index", g.op("Squeeze", keys, g.ints(2)), 1, (indexer.head_dim,))
    q = unflatten(build, linear(build, f"{name}.wq_b", q_latent), steps(build), indexer.heads, indexer.head_dim)
    head_weights = g.op("Cast", linear(build, f"{name}.weights_proj", x), to=TensorProto.FLOAT)
    head_weights = g.op("Mul", head_weights, g.scalar(indexer.heads**-0.5, np.float32))
    head_weights = unflatten(build, head_weights, steps(build), indexer.heads)
    open_ = g.op("Squeeze", causal_mask(build), g.ints(1))
    return g.op("Unsqueeze", choose(build, indexer, _rotate_front(build, q), keys, head_weights, open_), g.ints(1))


def _rotate_front(build: Build, x: str) -> str:
    """Rotate the first channels of x (B, S, heads, D), channel i with i + rope / 2, whatever the attention pairs."""
    g, rope = build.graph, build.cfg.rope
    cos, sin = turns(build, g.op("Unsqueeze", "position_ids", g.ints(2, 3)), rope)
    sizes = (rope.dim // 2, rope.dim // 2, build.cfg.indexer.head_dim - rope.dim if build.cfg.indexer else 0)
    first, second, rest = g.ops("Split", x, g.ints(*sizes), count=3, axis=-1)
    return g.op("Concat", *rotated(build, first, second, cos, sin), rest, axis=-1)


def _layer_norm(build: Build, name: str, x: str, eps: float) -> str:
    """(x - mean) / sqrt(variance + eps), times weight, plus bias, over the last dimension, in FP32."""
    g = build.graph
    with g.scope(name):
        wide = g.op("Cast", x, to=TensorProto.FLOAT)
        y = unit(build, g.op("Sub", wide, g.op("ReduceMean", wide, g.ints(-1), keepdims=1)), eps, wide=True)
        weight, bias = (
            g.weight(f"{name}.{part}", to_numpy(build.checkpoint.read(f"{name}.{part}"))) for part in ("weight", "bias")
        )
        return g.op("Cast", g.op("Add", g.op("Mul", y, weight), bias), to=g.elem_type)


def grouped_attention(build: Build, layer: int, stem: str, x: str) -> str:
    """Grouped-query attention: x (B S, hidden) -> (B S, hidden). Queries that share a key head become rows of it."""
    g, cfg = build.graph, build.cfg
    heads, shared, dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    names = cfg.names
    counts = ((names.q, heads), (names.k, shared), (names.v, shared))
    parts = [(linear(build, f"{stem}.{name}", x), count) for name, count in counts]
    if cfg.qk_norm:
        norms = (names.q_norm, names.k_norm)
        parts[:2] = [
            (_head_norm(build, f"{stem}.{name}", *part), part[1]) for name, part in zip(norms, parts, strict=False)
        ]
    if build.contrib and not build.attention8:
        q, k, v = (unflatten(build, part, steps(build), count * dim) for part, count in parts)
        return linear(build, f"{stem}.{names.o}", _attention_node(build, layer, q, k, v))
    q, k, v = (unflatten(build, part, steps(build), count, dim) for part, count in parts)
    q = g.op("Mul", rotate(build, q), g.scalar(softmax_scale(cfg.rope, dim)))
    q, k, v = (g.op("Transpose", part, perm=[0, 2, 1, 3]) for part in (q, rotate(build, k), v))
    k = _remember(build, layer, "key", k, 2, (shared, dim))  # (B, shared, T, dim)
    v = _remember(build, layer, "value", v, 2, (shared, dim))
    rows = g.op("Reshape", q, g.ints(0, shared, -1, dim)) if shared != heads else q
    scores = attention_product(build, rows, g.op("Transpose", k, perm=[0, 1, 3, 2]))
    if shared != heads:
        new = g.op("Slice", steps(build), g.ints(1), g.ints(2))
        scores = g.op("Reshape", scores, g.op("Concat", g.ints(0, heads), new, g.ints(-1), axis=0))
    weights = attention_weights(build, scores, RowMask(causal_mask(build)))
    if shared != heads:
        seen = g.op("Slice", _seen(build), g.ints(1), g.ints(2))
        weights = g.op("Reshape", weights, g.op("Concat", g.ints(0, shared, -1), seen, axis=0))
    out = attention_product(build, weights, _real(build, v), nonnegative=True)
    out = g.op("Reshape", out, g.ints(0, heads, -1, dim)) if shared != heads else out
    return linear(build, f"{stem}.{names.o}", _merge_heads(build, out, heads * dim))


def _head_norm(build: Build, name: str, x: str, heads: int) -> str:
    """Normalise each head of x (B S, heads dim) by the norm `name` over its channels."""
    g, dim = build.graph, build.cfg.head_dim
    normed = rms_norm(build, name, g.op("Reshape", x, g.ints(-1, heads, dim)), build.cfg.rms_norm_eps)
    return g.op("Reshape", normed, g.ints(-1, heads * dim))


def _attention_node(build: Build, layer: int, q: str, k: str, v: str) -> str:
    """onnxruntime's GroupQueryAttention on (B, S, heads dim); it appends to the cache itself."""
    g, cfg = build.graph, build.cfg
    shared, dim = cfg.num_key_value_heads, cfg.head_dim
    names = [f"{{}}.{layer}.{part}" for part in ("key", "value")]
    past = [g.input(n.format("past"), g.elem_type, ["batch", shared, "past", dim]) for n in names]
    total = g.op("Cast", g.op("Gather", _seen(build), g.constant(np.array(1, np.int64))), to=TensorProto.INT32)
    batch = g.op("Slice", _seen(build), g.ints(0), g.ints(1))
    last = g.op("Expand", g.op("Sub", total, g.scalar(1, np.int32)), batch)  # (B,): the last place that is filled
    q, k = (_rotation_node(build, part) for part in (q, k))
    present = [n.format("present") for n in names]
    out = g.ops(
        "GroupQueryAttention", q, k, v, *past, last, total, "", "", "", RowMask(causal_mask(build)).bias(g),
        count=3, domain=CONTRIB, named=("", *present),
        num_heads=cfg.num_attention_heads, kv_num_heads=shared, scale=softmax_scale(cfg.rope, dim),
    )  # fmt: skip
    for name in present:
        g.output(name, g.elem_type, ["batch", shared, "total", dim])
    return g.op("Reshape", out[0], g.ints(-1, cfg.num_attention_heads * dim))


def _rotation_node(build: Build, x: str) -> str:
    """onnxruntime's RotaryEmbedding on (B, S, heads dim): GroupQueryAttention's own rotation takes a token that is
    decoded behind padding for its place in the cache (onnxruntime 1.31). The table has one row for each new token."""
    g = build.graph
    table = turns(build, g.op("Reshape", "position_ids", g.ints(-1, 1)), build.cfg.rope)  # (B S, dim / 2)
    zero, one = (g.constant(np.array(value, np.int64)) for value in (0, 1))
    rows = g.op("Reshape", g.op("Range", zero, g.op("Size", "input_ids"), one), steps(build))
    return g.op("RotaryEmbedding", x, rows, *table, domain=CONTRIB, interleaved=int(build.cfg.rope.interleaved))


def _merge_heads(build: Build, x: str, width: int) -> str:
    g: Graph = build.graph
    return g.op("Reshape", g.op("Transpose", x, perm=[0, 2, 1, 3]), g.ints(-1, width))

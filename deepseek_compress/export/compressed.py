"""Attention of DeepSeek-V4 as ONNX nodes (`models.compressed`), with its cache.

| input | shape | |
|---|---|---|
| past.L.key | (batch, near, head_dim) | rotated keys, which are the values, of the last window - 1 tokens |
| past.L.entries | (batch, entries, head_dim) | compressed entries that are complete |
| past.L.open | (batch, open, 2 width) | values and gates of the tokens after the last entry |
| past.L.index_entries, past.L.index_open | the same | of the indexer |

Where entries overlap, `open` begins with the last full window, half of which goes into the next entry. `rate` tokens
make an entry, so entries begin where the text does: rows of a batch have no padding.
B batch, S new tokens, P past ones, W entries, H heads, D channels of a head.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from deepseek_compress.export.build import Build, Weight
from deepseek_compress.export.lowering import float_weight, linear, to_numpy
from deepseek_compress.export.pieces import RowMask, attention_weights, rms_norm, rotated, steps, turns, unflatten, unit
from deepseek_compress.export.sparse import choose
from deepseek_compress.models.config import Compressed, Indexer, Rope

END = np.iinfo(np.int64).max


class _Entries(NamedTuple):
    """One compressor: `name` of its module, `part` its caches' name."""

    name: str
    part: str
    rate: int
    dim: int
    overlapping: bool


def compressed_attention(build: Build, kinds: Compressed, layer: int, stem: str, x: str) -> str:
    """x (B S, hidden) -> (B S, hidden)."""
    g, cfg = build.graph, build.cfg
    heads, dim, rate = cfg.num_attention_heads, cfg.head_dim, kinds.rates[layer]
    rope = cfg.rope if rate else kinds.rope_window
    attention = f"{stem}.{cfg.names.attention}"
    latent = rms_norm(build, f"{attention}.q_norm", linear(build, f"{attention}.wq_a", x), cfg.rms_norm_eps)
    q = unflatten(build, linear(build, f"{attention}.wq_b", latent), steps(build), heads, dim)
    q = rotate_tail(build, rope, unit(build, q, cfg.rms_norm_eps), "position_ids")
    q = g.op("Mul", g.op("Transpose", q, perm=[0, 2, 1, 3]), g.scalar(dim**-0.5))
    kv = rms_norm(build, f"{attention}.kv_norm", linear(build, f"{attention}.wkv", x), cfg.rms_norm_eps)
    kv = rotate_tail(build, rope, unflatten(build, kv, steps(build), 1, dim), "position_ids")
    kv = g.op("Squeeze", kv, g.ints(2))
    past = g.input(f"past.{layer}.key", g.elem_type, ["batch", "near", dim])
    keys = g.op("Concat", past, kv, axis=1)
    near = g.op("Slice", keys, g.ints(1 - kinds.window), g.ints(END), g.ints(1), named=f"present.{layer}.key")
    g.output(near, g.elem_type, ["batch", "now near", dim])
    open_ = _window(build, kinds.window)
    if rate:
        found = entries(build, layer, attention, x, _Entries("compressor", "", rate, dim, kinds.overlapping[layer]))
        ready = _ready(build, found, rate)
        if kinds.overlapping[layer] and cfg.indexer is not None:
            ready = _chosen(build, cfg.indexer, layer, attention, x, latent, rate)
        keys, open_ = g.op("Concat", keys, found, axis=1), g.op("Concat", open_, ready, axis=2)
    out = _attend(build, attention, q, keys, g.op("Unsqueeze", open_, g.ints(1)))
    out = rotate_tail(build, rope, g.op("Transpose", out, perm=[0, 2, 1, 3]), "position_ids", back=True)
    return linear(build, f"{stem}.{cfg.names.o}", _grouped_output(build, kinds, f"{attention}.wo_a", out))


def _attend(build: Build, attention: str, q: str, keys: str, open_: str) -> str:
    """q (B, H, S, D), keys (B, T, D), open_ bool (B, 1, S, T) -> (B, H, S, D); each head's sink takes a share."""
    g, heads, dim = build.graph, build.cfg.num_attention_heads, build.cfg.head_dim
    batch, new = _size(build, "input_ids", 0), _size(build, "input_ids", 1)
    rows = g.op("Reshape", q, g.ints(0, -1, dim))
    scores = g.op("MatMul", rows, g.op("Transpose", keys, perm=[0, 2, 1]))
    scores = g.op("Reshape", scores, g.op("Concat", batch, g.ints(heads), new, g.ints(-1), axis=0))
    name = f"{attention}.attn_sink"
    sinks = g.weight(name, to_numpy(build.checkpoint.read(name)).astype(g.numpy))
    one = g.op("Concat", batch, g.ints(heads), new, g.ints(1), axis=0)
    sinks = g.op("Expand", g.op("Reshape", sinks, g.ints(1, heads, 1, 1)), one)
    always = g.op("Expand", g.constant(np.array(True)), g.op("Concat", batch, g.ints(1), new, g.ints(1), axis=0))
    mask = RowMask(g.op("Concat", open_, always, axis=3))
    weights = attention_weights(build, g.op("Concat", scores, sinks, axis=3), mask)
    weights = g.op("Slice", weights, g.ints(0), g.ints(-1), g.ints(3))
    seen = _size(build, keys, 1)
    weights = g.op("Reshape", weights, g.op("Concat", batch, g.ints(-1), seen, axis=0))
    return g.op("Reshape", g.op("MatMul", weights, keys), g.ints(0, heads, -1, dim))


def _grouped_output(build: Build, kinds: Compressed, name: str, out: str) -> str:
    """out (B, S, H, D) -> (B S, groups * o_lora_rank): each group of heads has a projection of its own."""
    g, width = build.graph, build.cfg.num_attention_heads * build.cfg.head_dim // kinds.o_groups
    with g.scope(name):
        weight = g.op(
            "Reshape", float_weight(build, Weight(name, (name,))), g.ints(kinds.o_groups, kinds.o_lora_rank, width)
        )
        rows = g.op("Transpose", g.op("Reshape", out, g.ints(-1, kinds.o_groups, width)), perm=[1, 0, 2])
        y = g.op("MatMul", rows, g.op("Transpose", weight, perm=[0, 2, 1]))  # (groups, B S, o_lora_rank)
        y = g.op("Transpose", y, perm=[1, 0, 2])
        return g.op("Reshape", y, g.ints(-1, kinds.o_groups * kinds.o_lora_rank))


def _chosen(build: Build, indexer: Indexer, layer: int, attention: str, x: str, latent: str, rate: int) -> str:
    """bool (B, S, W): the entries that the indexer chose for each query, of those that are ready."""
    g, name = build.graph, f"{attention}.indexer"
    own = _Entries("indexer.compressor", "index_", rate, indexer.head_dim, True)
    keys = entries(build, layer, attention, x, own)
    q = unflatten(build, linear(build, f"{name}.wq_b", latent), steps(build), indexer.heads, indexer.head_dim)
    q = rotate_tail(build, build.cfg.rope, q, "position_ids")
    head_weights = g.op("Cast", linear(build, f"{name}.weights_proj", x), to=TensorProto.FLOAT)
    head_weights = g.op("Mul", head_weights, g.scalar(indexer.heads**-0.5, np.float32))
    head_weights = unflatten(build, head_weights, steps(build), -1)
    return choose(build, indexer, q, keys, head_weights, _ready(build, keys, rate))


def entries(build: Build, layer: int, attention: str, x: str, own: _Entries) -> str:
    """(B, W, dim): the entries of the cache, and those that end in the new tokens; see `models.compressed.entries`.

    Computed with a window of zeros behind the last, which is cut off: reductions over nothing have no shape.
    """
    g, name = build.graph, f"{attention}.{own.name}"
    width = 2 * own.dim if own.overlapping else own.dim
    batch, rate = _size(build, "input_ids", 0), g.ints(own.rate)
    given = g.op("Concat", linear(build, f"{name}.wkv", x), linear(build, f"{name}.wgate", x), axis=-1)
    given = unflatten(build, given, steps(build), -1)
    cache = f"{{}}.{layer}.{own.part}{{}}"
    dims: list[int | str] = ["batch", f"{own.part}open {own.rate}", 2 * width]
    past = g.input(cache.format("past", "open"), g.elem_type, dims)
    tokens = g.op("Concat", past, given, axis=1)
    windows = g.op("Div", _size(build, tokens, 1), rate)  # full ones
    full = g.op("Slice", tokens, g.ints(0), g.op("Mul", windows, rate), g.ints(1))
    behind = g.op("Expand", g.scalar(0), g.op("Concat", batch, g.ints(own.rate, 2 * width), axis=0))
    shape = g.op("Concat", batch, g.ints(-1, own.rate, 2 * width), axis=0)
    values, gates = g.ops(
        "Split", g.op("Reshape", g.op("Concat", full, behind, axis=1), shape), g.ints(width, width), count=2, axis=-1
    )
    ape = g.weight(f"{name}.ape", to_numpy(build.checkpoint.read(f"{name}.ape")))
    gates = g.op("Add", g.op("Cast", gates, to=TensorProto.FLOAT), ape)
    if own.overlapping:
        values, gates = _overlap(build, values, own, 0, g.numpy), _overlap(build, gates, own, -1e30, np.float32)
    gate_weights = g.op("Cast", g.op("Softmax", gates, axis=2), to=g.elem_type)
    mean = g.op("ReduceSum", g.op("Mul", values, gate_weights), g.ints(2), keepdims=0)  # (B, windows + 1, dim)
    known = g.input(cache.format("past", "entries"), g.elem_type, ["batch", f"entries {own.rate}", own.dim])
    again = _again(build, own)
    made = _placed(build, f"{name}.norm", mean, g.op("Sub", _size(build, known, 1), again), own)
    made = g.op("Slice", made, again, windows, g.ints(1))
    found = g.op("Concat", known, made, axis=1, named=cache.format("present", "entries"))
    g.output(found, g.elem_type, ["batch", f"now entries {own.rate}", own.dim])
    first = g.op("Sub", windows, g.ints(1)) if own.overlapping else windows
    start = g.op("Mul", g.op("Max", first, g.ints(0)), rate)
    rest = g.op("Slice", tokens, start, g.ints(END), g.ints(1), named=cache.format("present", "open"))
    g.output(rest, g.elem_type, ["batch", f"now {own.part}open {own.rate}", 2 * width])
    return found


def _again(build: Build, own: _Entries) -> str:
    """int64 (1,): 1 where the first window is one whose entry is in the cache, kept for the one that overlaps it."""
    g = build.graph
    if not own.overlapping:
        return g.ints(0)
    past = g.op("Sub", _size(build, "attention_mask", 1), _size(build, "input_ids", 1))
    return g.op("Min", g.op("Div", past, g.ints(own.rate)), g.ints(1))


def _placed(build: Build, norm: str, mean: str, first: str, own: _Entries) -> str:
    """mean (B, L, dim), normed and rotated to the places of the entries `first`, `first` + 1, ..."""
    g = build.graph
    normed = rms_norm(build, norm, mean, build.cfg.rms_norm_eps)
    zero, one = (g.constant(np.array(value, np.int64)) for value in (0, 1))
    count = g.op("Squeeze", _size(build, mean, 1), g.ints(0))
    places = g.op("Mul", g.op("Add", g.op("Range", zero, count, one), first), g.ints(own.rate))
    rotated = rotate_tail(
        build, build.cfg.rope, g.op("Unsqueeze", normed, g.ints(2)), g.op("Unsqueeze", places, g.ints(0))
    )
    return g.op("Squeeze", rotated, g.ints(2))


def _overlap(build: Build, values: str, own: _Entries, first: float, kind: type) -> str:
    """(B, W, rate, 2 dim) -> (B, W, 2 rate, dim): the window before, then the own; `first` where there is none."""
    g = build.graph
    before, mine = g.ops("Split", values, g.ints(own.dim, own.dim), count=2, axis=-1)
    shape = g.op("Concat", _size(build, "input_ids", 0), g.ints(1, own.rate, own.dim), axis=0)
    shifted = g.op("Concat", g.op("Expand", g.scalar(first, kind), shape), before, axis=1)
    return g.op("Concat", g.op("Slice", shifted, g.ints(0), g.ints(-1), g.ints(1)), mine, axis=2)


def _ready(build: Build, found: str, rate: int) -> str:
    """bool (B, S, W): entries that end before a query."""
    g = build.graph
    one = g.constant(np.array(1, np.int64))
    count = g.op("Div", g.op("Add", "position_ids", one), g.constant(np.array(rate, np.int64)))
    number = g.op("Squeeze", _size(build, found, 1), g.ints(0))
    each = g.op("Range", g.constant(np.array(0, np.int64)), number, one)
    return g.op("Less", each, g.op("Unsqueeze", count, g.ints(2)))


def _window(build: Build, window: int) -> str:
    """bool (B, S, near + S): a query sees itself and the `window` - 1 tokens before it. Shared by all blocks."""
    g = build.graph
    zero, one = (g.constant(np.array(value, np.int64)) for value in (0, 1))
    new, seen = (g.op("Squeeze", _size(build, name, 1), g.ints(0)) for name in ("input_ids", "attention_mask"))
    past = g.op("Sub", seen, new)
    near = g.op("Min", past, g.constant(np.array(window - 1, np.int64)))
    query = g.op("Add", g.op("Range", zero, new, one), past)
    key = g.op("Add", g.op("Range", zero, g.op("Add", near, new), one), g.op("Sub", past, near))
    distance = g.op("Sub", g.op("Unsqueeze", query, g.ints(1)), key)
    limit = g.constant(np.array(window, np.int64))
    open_ = g.op("And", g.op("GreaterOrEqual", distance, zero), g.op("Less", distance, limit))
    shape = g.op("Concat", _size(build, "input_ids", 0), g.op("Shape", open_), axis=0)
    return g.op("Expand", open_, shape)


def rotate_tail(build: Build, rope: Rope, x: str, positions: str, back: bool = False) -> str:
    """Rotate the last `rope.dim` channels of x (B, L, heads, D) by positions (B or 1, L), pairs keeping their order."""
    g, half = build.graph, rope.dim // 2
    cos, sin = turns(build, g.op("Unsqueeze", positions, g.ints(2, 3)), rope)  # (B, L, 1, half)
    sin = g.op("Neg", sin) if back else sin
    start, end, last = g.ints(-rope.dim), g.ints(END), g.ints(-1)
    still, tail = g.op("Slice", x, g.ints(0), start, last), g.op("Slice", x, start, end, last)
    pairs = g.op("Reshape", tail, g.ints(0, 0, 0, half, 2))
    first, second = (g.op("Gather", pairs, g.constant(np.array(i, np.int64)), axis=-1) for i in (0, 1))
    both = rotated(build, first, second, cos, sin)
    pairs = g.op("Concat", *(g.op("Unsqueeze", part, last) for part in both), axis=-1)
    return g.op("Concat", still, g.op("Reshape", pairs, g.ints(0, 0, 0, rope.dim)), axis=-1)


def _size(build: Build, value: str, axis: int) -> str:
    """int64 (1,): the length of `value` along `axis`."""
    g = build.graph
    return g.op("Slice", g.op("Shape", value), g.ints(axis), g.ints(axis + 1))

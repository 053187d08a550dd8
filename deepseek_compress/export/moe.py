"""Mixture of experts as ONNX nodes: who sees which token, and the two ways to dispatch.

Dense (every run-time): all experts see all tokens in three batched products, and the gate weights, mostly zero, make
the sum right. It costs experts / top_k times the arithmetic, and TensorRT has nothing else (no NonZero). Routed
(onnxruntime): each expert sees the tokens that chose it. The router computes as in `models.moe`, in FP32.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from deepseek_compress.export.build import Build
from deepseek_compress.export.lowering import expert_linear, to_numpy
from deepseek_compress.export.pieces import gated, swiglu
from deepseek_compress.models.config import Moe


def _first_of(build: Build, values: str, count: int, width: int) -> tuple[str, str]:
    """bool (..., width): whether an entry of `values` is among the `count` largest; and those largest."""
    g = build.graph
    best, index = g.ops("TopK", values, g.ints(count), count=2, axis=-1)
    chosen = g.op("Equal", g.op("Unsqueeze", index, g.ints(-1)), g.constant(np.arange(width, dtype=np.int64)))
    found = g.op("ReduceMax", g.op("Cast", chosen, to=TensorProto.FLOAT), g.ints(-2), keepdims=0)
    return g.op("Greater", found, g.scalar(0.5, np.float32)), best


def route(build: Build, moe: Moe, stem: str, x: str) -> str:
    """x (tokens, hidden) -> float32 (tokens, experts): what each expert's output is multiplied with, mostly zeros."""
    g = build.graph
    wide = g.op("Cast", x, to=TensorProto.FLOAT)
    router = f"{stem}.{moe.names.router}"
    weight = g.weight(router, to_numpy(build.checkpoint.read(router)))
    scores = _scores(build, moe, g.op("Gemm", wide, weight, transB=1))
    table = f"{stem}.{moe.names.table}"
    if table in build.checkpoint.header.tensors:
        return _normalized(build, moe, g.op("Mul", scores, _by_token_id(build, moe, table)))
    choice = scores
    if moe.method == "noaux_tc":
        name = f"{stem}.{moe.names.bias}"
        choice = g.op("Add", scores, g.weight(name, to_numpy(build.checkpoint.read(name))))
    if moe.method != "greedy" and moe.groups > 1:
        choice = _close_groups(build, moe, choice)
    chosen, _ = _first_of(build, choice, moe.top_k, moe.experts)
    return _normalized(build, moe, g.op("Where", chosen, scores, g.scalar(0, np.float32)))


def _scores(build: Build, moe: Moe, logits: str) -> str:
    g = build.graph
    if moe.scoring == "softmax":
        return g.op("Softmax", logits, axis=-1)
    return g.op("Sigmoid", logits) if moe.scoring == "sigmoid" else g.op("Sqrt", g.op("Softplus", logits))


def _by_token_id(build: Build, moe: Moe, table: str) -> str:
    """float32 (tokens, experts): how often the table names an expert for the token (DeepSeek-V4's first blocks)."""
    g = build.graph
    experts = g.weight(table, to_numpy(build.checkpoint.read(table, None)).astype(np.int64))  # (vocabulary, K)
    own = g.op("Gather", experts, g.op("Reshape", "input_ids", g.ints(-1)), axis=0)
    same = g.op("Equal", g.op("Unsqueeze", own, g.ints(-1)), g.constant(np.arange(moe.experts, dtype=np.int64)))
    return g.op("ReduceSum", g.op("Cast", same, to=TensorProto.FLOAT), g.ints(1), keepdims=0)


def _normalized(build: Build, moe: Moe, gate_weights: str) -> str:
    g = build.graph
    if moe.normalize:
        total = g.op("Add", g.op("ReduceSum", gate_weights, g.ints(-1), keepdims=1), g.scalar(1e-20, np.float32))
        gate_weights = g.op("Div", gate_weights, total)
    return g.op("Mul", gate_weights, g.scalar(moe.scaling, np.float32))


def _close_groups(build: Build, moe: Moe, choice: str) -> str:
    """Scores of the experts outside the best groups out of reach (V3: below every score, V2: 0)."""
    g = build.graph
    groups = g.op("Reshape", choice, g.ints(-1, moe.groups, moe.experts // moe.groups))
    if moe.method == "noaux_tc":
        best, _ = g.ops("TopK", groups, g.ints(2), count=2, axis=-1)
        best = g.op("ReduceSum", best, g.ints(-1), keepdims=0)
    else:
        best = g.op("ReduceMax", groups, g.ints(-1), keepdims=0)
    kept, _ = _first_of(build, best, moe.top_groups, moe.groups)
    closed = float(np.finfo(np.float32).min) if moe.method == "noaux_tc" else 0.0
    groups = g.op("Where", g.op("Unsqueeze", kept, g.ints(-1)), groups, g.scalar(closed, np.float32))
    return g.op("Reshape", groups, g.ints(-1, moe.experts))


def _all_experts(build: Build, moe: Moe, stem: str, x: str, gate_weights: str) -> str:
    """Every expert sees every token, three batched products in all; the gate weights make the sum right."""
    g = build.graph
    every = g.op("Unsqueeze", x, g.ints(0))
    gate, up = (expert_linear(build, stem, moe.experts, name, every) for name in (moe.names.gate, moe.names.up))
    y = expert_linear(build, stem, moe.experts, moe.names.down, gated(build, gate, up))
    share = g.op("Unsqueeze", g.op("Transpose", g.op("Cast", gate_weights, to=g.elem_type), perm=[1, 0]), g.ints(2))
    return g.op("ReduceSum", g.op("Mul", y, share), g.ints(0), keepdims=0)


def _routed_experts(build: Build, moe: Moe, stem: str, x: str, gate_weights: str) -> str:
    """Each expert sees the tokens that chose it. For run-times that know NonZero."""
    g = build.graph
    out = g.op("Cast", g.op("Mul", x, g.scalar(0)), to=TensorProto.FLOAT)  # onnxruntime adds rows of FP32 alone
    by_expert = g.op("Cast", g.op("Transpose", gate_weights, perm=[1, 0]), to=g.elem_type)  # (experts, tokens)
    for expert in range(moe.experts):
        share = g.op("Gather", by_expert, g.constant(np.array(expert, np.int64)))
        rows = g.op("Reshape", g.op("NonZero", share), g.ints(-1))
        y = swiglu(build, f"{stem}.{expert}", g.op("Gather", x, rows))
        column = g.ints(-1, 1)
        y = g.op("Mul", y, g.op("Reshape", g.op("Gather", share, rows), column))
        y = g.op("Cast", y, to=TensorProto.FLOAT)
        out = g.op("ScatterND", out, g.op("Reshape", rows, column), y, reduction="add")
    return g.op("Cast", out, to=g.elem_type)


def moe_part(build: Build, moe: Moe, stem: str, x: str) -> str:
    """Routed and shared experts: x (tokens, hidden) -> (tokens, hidden), without the residual."""
    gate_weights = route(build, moe, stem, x)
    y = (_routed_experts if build.contrib else _all_experts)(build, moe, f"{stem}.{moe.names.experts}", x, gate_weights)
    return build.graph.op("Add", y, swiglu(build, f"{stem}.{moe.names.shared}", x)) if moe.shared else y

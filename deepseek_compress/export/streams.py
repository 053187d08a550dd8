"""Hyper-connections of DeepSeek-V4 as ONNX nodes (`models.hyper`), in FP32; between blocks (tokens, N hidden).

N streams.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from onnx import TensorProto

from deepseek_compress.export.build import Build
from deepseek_compress.export.lowering import to_numpy
from deepseek_compress.export.pieces import rms_norm, unit
from deepseek_compress.models.config import HyperConnections


class _Mixing(NamedTuple):
    """One hyper-connection, FP32."""

    pre: str  # (tokens, N)
    post: str  # (tokens, N)
    comb: str  # (tokens, N, N): comb[j, k] is what stream j gives to stream k


def spread(build: Build, x: str, name: str) -> str:
    """(tokens, hidden) -> N equal streams, (tokens, N hidden)."""
    streams = build.cfg.streams
    return x if streams is None else build.graph.op("Concat", *[x] * streams.streams, axis=-1, named=name)


def around(build: Build, hyper: HyperConnections, site: str, norm: str, x: str, part: Callable[[str], str]) -> str:
    """x (tokens, N hidden) with what `part`, of (tokens, hidden), adds to it through the connection `site`."""
    g, cfg = build.graph, build.cfg
    with g.scope(site):
        streams = g.op("Reshape", x, g.ints(-1, hyper.streams, cfg.hidden_size))
        mixed = _mixing(build, hyper, site, x)
        y = _collapse(build, mixed.pre, streams)
    y = part(rms_norm(build, norm, y, cfg.rms_norm_eps))
    with g.scope(site):
        post, comb = (g.op("Cast", value, to=g.elem_type) for value in (mixed.post, mixed.comb))
        own = g.op("Mul", g.op("Unsqueeze", post, g.ints(2)), g.op("Unsqueeze", y, g.ints(1)))
        out = g.op("Add", own, g.op("MatMul", g.op("Transpose", comb, perm=[0, 2, 1]), streams))
        return g.op("Reshape", out, g.ints(-1, hyper.streams * cfg.hidden_size))


def last_collapse(build: Build, hyper: HyperConnections, x: str) -> str:
    """(tokens, N hidden) -> what the last norm takes (tokens, hidden)."""
    g = build.graph
    with g.scope("hc_head"):
        values = _linear(build, "hc_head_fn", unit(build, x, build.cfg.rms_norm_eps, wide=True))
        values = g.op("Add", g.op("Mul", values, _read(build, "hc_head_scale")), _read(build, "hc_head_base"))
        pre = g.op("Add", g.op("Sigmoid", values), g.scalar(hyper.eps, np.float32))
        return _collapse(build, pre, g.op("Reshape", x, g.ints(-1, hyper.streams, build.cfg.hidden_size)))


def _mixing(build: Build, hyper: HyperConnections, site: str, x: str) -> _Mixing:
    g, n = build.graph, hyper.streams
    values = _linear(build, f"{site}_fn", unit(build, x, build.cfg.rms_norm_eps, wide=True))
    scale = np.repeat(to_numpy(build.checkpoint.read(f"{site}_scale")), (n, n, n * n)).astype(np.float32)
    values = g.op("Add", g.op("Mul", values, g.weight(f"{site}_scale by value", scale)), _read(build, f"{site}_base"))
    pre, post, comb = g.ops("Split", values, g.ints(n, n, n * n), count=3, axis=-1)
    eps = g.scalar(hyper.eps, np.float32)
    comb = g.op("Add", g.op("Softmax", g.op("Reshape", comb, g.ints(-1, n, n)), axis=-1), eps)
    for axis in (-2, *(-1, -2) * (hyper.sinkhorn_iterations - 1)):
        comb = g.op("Div", comb, g.op("Add", g.op("ReduceSum", comb, g.ints(axis), keepdims=1), eps))
    pre = g.op("Add", g.op("Sigmoid", pre), eps)
    return _Mixing(pre, g.op("Mul", g.op("Sigmoid", post), g.scalar(2, np.float32)), comb)


def _collapse(build: Build, pre: str, streams: str) -> str:
    """pre (tokens, N), streams (tokens, N, hidden) -> (tokens, hidden)."""
    g = build.graph
    wide = g.op("Cast", streams, to=TensorProto.FLOAT)
    total = g.op("ReduceSum", g.op("Mul", g.op("Unsqueeze", pre, g.ints(2)), wide), g.ints(1), keepdims=0)
    return g.op("Cast", total, to=g.elem_type)


def _linear(build: Build, name: str, x: str) -> str:
    return build.graph.op("Gemm", x, _read(build, name), transB=1)


def _read(build: Build, name: str) -> str:
    """Read a tensor of the checkpoint by its name, as FP32."""
    return build.graph.weight(name, to_numpy(build.checkpoint.read(name)).astype(np.float32))

"""Indexers as ONNX nodes: which tokens (DeepSeek-V3.2) or entries (V4) a query may see, of those that are open to it.

score(t, s) = sum over heads of w_h(t) relu(q_h(t) k(s) / sqrt(D)), as in `models.mla` and `models.compressed`, in FP32.
TopK takes `top_k` columns whatever their number: as many closed ones stand behind the last, and what is chosen of those
stays closed. B batch, S new tokens, T columns.
"""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from deepseek_compress.export.build import Build
from deepseek_compress.models.config import Indexer

LOWEST = float(np.finfo(np.float32).min)


def choose(build: Build, indexer: Indexer, q: str, keys: str, head_weights: str, open_: str) -> str:
    """q (B, S, heads, D), keys (B, T, D), head_weights (B, S, heads), open_ bool (B, S, T) -> bool (B, S, T).

    `head_weights`: weights of the heads, with every factor of the score in them but relu's argument's head_dim^-1/2.
    """
    g = build.graph
    batch, new = (g.op("Slice", g.op("Shape", "input_ids"), g.ints(i), g.ints(i + 1)) for i in (0, 1))
    q, keys, head_weights = (g.op("Cast", part, to=TensorProto.FLOAT) for part in (q, keys, head_weights))
    rows = g.op("Reshape", q, g.op("Concat", batch, g.ints(-1, indexer.head_dim), axis=0))
    closed = g.op(
        "Expand", g.scalar(0, np.float32), g.op("Concat", batch, g.ints(indexer.top_k, indexer.head_dim), axis=0)
    )
    every = g.op("Concat", keys, closed, axis=1)
    width = g.op("Slice", g.op("Shape", every), g.ints(1), g.ints(2))
    scores = g.op("MatMul", rows, g.op("Transpose", every, perm=[0, 2, 1]))
    scores = g.op("Mul", g.op("Relu", scores), g.scalar(indexer.head_dim**-0.5, np.float32))
    scores = g.op("Reshape", scores, g.op("Concat", batch, new, g.ints(indexer.heads), width, axis=0))
    index = g.op(
        "Squeeze", g.op("MatMul", g.op("Unsqueeze", head_weights, g.ints(2)), scores), g.ints(2)
    )  # (B, S, T + K)
    behind = g.op("Expand", g.constant(np.array(False)), g.op("Concat", batch, new, g.ints(indexer.top_k), axis=0))
    index = g.op("Where", g.op("Concat", open_, behind, axis=2), index, g.scalar(LOWEST, np.float32))
    _, best = g.ops("TopK", index, g.ints(indexer.top_k), count=2, axis=-1)
    ones = g.op("Expand", g.scalar(1, np.float32), g.op("Shape", best))
    zeros = g.op("Expand", g.scalar(0, np.float32), g.op("Shape", index))
    chosen = g.op("Greater", g.op("ScatterElements", zeros, best, ones, axis=2), g.scalar(0.5, np.float32))
    count = g.op("Slice", g.op("Shape", open_), g.ints(2), g.ints(3))
    return g.op("And", g.op("Slice", chosen, g.ints(0), count, g.ints(2)), open_)

"""DeepSeek-V4.1 in plain loops and float64: slow, obvious, and written from the formulas alone.

One text at a time; a block takes what the one before it hands on, `Handed`, and gives the same. Nothing of the package
is used but the names of tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@dataclass
class Handed:
    """Streams (N, T, hidden), pre (N, T), and what the last source published."""

    streams: Array
    pre: Array
    entries: Array = field(default_factory=lambda: np.zeros((0, 0)))
    keys: Array = field(default_factory=lambda: np.zeros((0, 0)))
    chosen: list[list[int]] = field(default_factory=list)
    blocks: list[list[int]] = field(default_factory=list)  # candidates of each query


class Reference:
    """text: `text_config`; weights: logical tensors in float64; folded: folded ids of all tokens."""

    def __init__(self, text: dict[str, Any], weights: dict[str, Array], folded: list[int], rounded: bool) -> None:
        self.c, self.w, self.folded, self.rounded = text, weights, folded, rounded
        self.eps = text["rms_norm_eps"]

    def begin(self, tokens: list[int]) -> Handed:
        embedded = self.w["embed.weight"][tokens]
        n = self.c["hc_mult"]
        pre = np.zeros((n, len(tokens)))
        pre[0] = 1
        return Handed(np.stack([embedded] * n), pre)

    def norm(self, x: Array, name: str) -> Array:
        return self.w[name] * x / np.sqrt((x**2).mean(-1, keepdims=True) + self.eps)

    def linear(self, name: str, x: Array) -> Array:
        return x @ self.w[name + ".weight"].T

    def block(self, i: int, h: Handed, tokens: list[int]) -> Handed:
        p = f"layers.{i}."
        if i in self.c["engram_layer_ids"]:
            h.streams = self.engram(i, h.streams, tokens)
        a = self.mixes(p + "hc_attn", h.streams)
        y = self.attention(i, self.norm(np.einsum("nt,ntd->td", h.pre, h.streams), p + "attn_norm.weight"), h)
        h.streams = self.spread(h.streams, y, a)
        f = self.mixes(p + "hc_ffn", h.streams)
        z = self.moe(p + "ffn.", self.norm(np.einsum("nt,ntd->td", a[0], h.streams), p + "ffn_norm.weight"))
        h.streams, h.pre = self.spread(h.streams, z, f), f[0]
        return h

    def logits(self, h: Handed) -> Array:
        x = self.norm(np.einsum("nt,ntd->td", h.pre, h.streams), "norm.weight")
        return x @ self.w["head.weight"].T

    def mixes(self, name: str, streams: Array) -> tuple[Array, Array, Array]:
        """pre (N, T), post (N, T), C (N, N, T): C[j, k] is what stream j gives to stream k."""
        n, length, _ = streams.shape
        pre, post, comb = np.zeros((n, length)), np.zeros((n, length)), np.zeros((n, n, length))
        s, b, small = self.w[name + "_scale"], self.w[name + "_base"], self.c["hc_eps"]
        for t in range(length):
            flat = streams[:, t].reshape(-1)
            m = (self.w[name + "_fn"] @ flat) / math.sqrt((flat**2).mean() + self.eps)
            pre[:, t] = 1 / (1 + np.exp(-(m[:n] * s[0] + b[:n]))) + small
            post[:, t] = 2 / (1 + np.exp(-(m[n : 2 * n] * s[1] + b[n : 2 * n])))
            c = (m[2 * n :] * s[2] + b[2 * n :]).reshape(n, n)
            c = np.exp(c - c.max(1, keepdims=True))
            c = c / c.sum(1, keepdims=True) + small
            c = c / (c.sum(0, keepdims=True) + small)
            for _ in range(self.c["hc_sinkhorn_iters"] - 1):
                c = c / (c.sum(1, keepdims=True) + small)
                c = c / (c.sum(0, keepdims=True) + small)
            comb[:, :, t] = c
        return pre, post, comb

    def spread(self, streams: Array, added: Array, mixed: tuple[Array, Array, Array]) -> Array:
        out = np.zeros_like(streams)
        for k in range(len(streams)):
            out[k] = mixed[1][k][:, None] * added
            for j in range(len(streams)):
                out[k] += mixed[2][j, k][:, None] * streams[j]
        return out

    def engram(self, i: int, streams: Array, tokens: list[int]) -> Array:
        p, c, length = f"layers.{i}.engram.", self.c, len(tokens)
        table, d = self.w[p + "embed.weight"], c["hidden_size"]
        found = np.stack([np.concatenate([table[row] for row in rows]) for rows in self.rows(i, tokens)])
        kv, out = self.linear(p + "wkv", found), streams.copy()
        for n in range(c["hc_mult"]):
            key, value = kv[:, n * d : (n + 1) * d], kv[:, -d:]
            for t in range(length):
                h = streams[n, t] / math.sqrt((streams[n, t] ** 2).mean() + self.eps)
                k = key[t] / math.sqrt((key[t] ** 2).mean() + self.eps)
                dot = (h * self.w[p + "q_weight"][n] * self.w[p + "k_weight"][n] * k).sum() / math.sqrt(d)
                gate = 1 / (1 + math.exp(-math.copysign(math.sqrt(max(abs(dot), 1e-6)), dot)))
                out[n, t] += gate * value[t]
        return out

    def rows(self, i: int, tokens: list[int]) -> list[list[int]]:
        c = self.c
        heads, ngrams = c["engram_n_heads"], c["engram_max_ngram_size"]
        number, moduli = c["engram_vocab_size"], []
        while len(moduli) < (ngrams - 1) * heads * len(c["engram_layer_ids"]):
            if all(number % d for d in range(2, number)):
                moduli.append(number)
            number += 1
        place = c["engram_layer_ids"].index(i) * (ngrams - 1) * heads
        mine = moduli[place : place + (ngrams - 1) * heads]
        most = max(1, ((2**63 - 1) // c["engram_compressed_vocab_size"]) // 2)
        factors = np.random.default_rng(10007 * i).integers(0, most, ngrams, dtype=np.int64) * 2 + 1
        found = []
        for at in range(len(tokens)):
            back = [self.folded[tokens[at - s]] if at >= s else self.folded[c["engram_pad_token_id"]]
                    for s in range(ngrams)]  # fmt: skip
            mixed, rows = back[0] * int(factors[0]), []
            for s in range(1, ngrams):
                mixed ^= back[s] * int(factors[s])
                for head in range(heads):
                    column = (s - 1) * heads + head
                    rows.append(mixed % mine[column] + sum(mine[:column]))
            found.append(rows)
        return found

    def attention(self, i: int, x: Array, h: Handed) -> Array:
        c, p = self.c, f"layers.{i}.attn."
        heads, dim, length, ratio = c["num_attention_heads"], c["head_dim"], len(x), c["compress_ratios"][i]
        qr = self.norm(self.linear(p + "wq_a", x), p + "q_norm.weight")
        q = self.rope(self.linear(p + "wq_b", qr).reshape(length, heads, dim), range(length), ratio > 0)
        kv = self.rope(self.norm(self.linear(p + "wkv", x), p + "kv_norm.weight"), range(length), ratio > 0)
        kv = self.qdq(kv, "fp8", 32)
        if ratio:
            if i in c["kv_source_layer_ids"]:
                self.publish(p, x, ratio, h)
            if i in c["index_source_layer_ids"]:
                self.choose(i, x, qr, ratio, h)
        out = np.zeros((length, heads, dim))
        for t in range(length):
            seen = [kv[s] for s in range(max(0, t - c["sliding_window"] + 1), t + 1)]
            seen += [h.entries[j] for j in h.chosen[t]] if ratio else []
            keys = np.stack(seen)
            for head in range(heads):
                score = keys @ q[t, head] / math.sqrt(dim)
                top = max(score.max(), self.w[p + "attn_sink"][head])
                share = np.exp(score - top)
                out[t, head] = share @ keys / (share.sum() + np.exp(self.w[p + "attn_sink"][head] - top))
        out = self.rope(out, range(length), ratio > 0, back=True).reshape(length, c["o_groups"], -1)
        wo_a = self.w[p + "wo_a.weight"].reshape(c["o_groups"], c["o_lora_rank"], -1)
        z = np.concatenate([out[:, g] @ wo_a[g].T for g in range(c["o_groups"])], axis=1)
        return self.linear(p + "wo_b", z)

    def publish(self, p: str, x: Array, ratio: int, h: Handed) -> None:
        count = len(x) // ratio
        v = self.linear(p + "compressor.wkv", x)
        latent = np.zeros((count, v.shape[1]))
        for j in range(count):
            mine = slice(j * ratio, (j + 1) * ratio)
            share = np.ones((1, 1))
            if ratio > 1:
                g = self.linear(p + "compressor.wgate", x[mine])
                share = np.exp(g - g.max(0)) / np.exp(g - g.max(0)).sum(0)
            latent[j] = (v[mine] * share).sum(0)
        latent = self.norm(latent, p + "compressor.norm.weight")
        places = [j * ratio for j in range(count)]
        key = self.norm(self.linear(p + "indexer.wk", latent), p + "indexer.k_norm.weight")
        h.keys = self.qdq(self.rope(key, places, True), "fp4", 32)
        h.entries = self.qdq(self.rope(latent, places, True), "fp4_e4m3", 16)

    def choose(self, i: int, x: Array, qr: Array, ratio: int, h: Handed) -> None:
        c, p, length = self.c, f"layers.{i}.attn.indexer.", len(x)
        heads, dim, size = c["index_n_heads"], c["index_head_dim"], c["candidate_block_size"]
        q = self.linear(p + "wq_b", qr).reshape(length, heads, dim)
        q = self.qdq(self.rope(q, range(length), True), "fp4", 32)
        w = self.linear(p + "weights_proj", x) / math.sqrt(dim) / math.sqrt(heads)
        h.chosen, before = [], h.blocks
        if i == c["candidate_source_layer_id"]:
            h.blocks = []
        for t in range(length):
            visible = (t + 1) // ratio
            score = {j: sum(max(0.0, q[t, n] @ h.keys[j]) * w[t, n] for n in range(heads)) for j in range(visible)}
            if i == c["candidate_source_layer_id"]:
                best = {b: max(score[j] for j in score if j // size == b) for b in {j // size for j in score}}
                if visible:
                    best[(visible - 1) // size] = math.inf
                h.blocks.append(sorted(best, key=lambda b: -best[b])[: c["candidate_topk_blocks"]])
            elif i > c["candidate_source_layer_id"]:
                score = {j: s for j, s in score.items() if j // size in before[t]}
            h.chosen.append(sorted(sorted(score, key=lambda j: -score[j])[: c["index_topk"]]))

    def rope(self, x: Array, places: Any, long: bool, back: bool = False) -> Array:
        """x (..., dim) whose first axis goes with `places`; pairs side by side in the last channels turn."""
        c, r = self.c, self.c["qk_rope_head_dim"]
        theta = c["compress_rope_theta"] if long else c["rope_theta"]
        s, out = c["rope_scaling"], x.copy()
        for k in range(r // 2):
            f = theta ** (-2 * k / r)
            if long:
                edge = [r * math.log(s["original_max_position_embeddings"] / (2 * math.pi * b)) / (2 * math.log(theta))
                        for b in (s["beta_fast"], s["beta_slow"])]  # fmt: skip
                low, high = max(math.floor(edge[0]), 0), min(math.ceil(edge[1]), r - 1)
                ramp = min(max((k - low) / max(high - low, 1e-3), 0), 1)
                f = f / s["factor"] * ramp + f * (1 - ramp)
            a, b = x.shape[-1] - r + 2 * k, x.shape[-1] - r + 2 * k + 1
            for row, place in enumerate(places):
                angle = -f * place if back else f * place
                first, second = x[row, ..., a], x[row, ..., b]
                out[row, ..., a] = first * math.cos(angle) - second * math.sin(angle)
                out[row, ..., b] = first * math.sin(angle) + second * math.cos(angle)
        return out

    def qdq(self, x: Array, kind: str, size: int) -> Array:
        if not self.rounded:
            return x
        groups = x.reshape(-1, size)
        return np.stack([rounded(group, kind) for group in groups]).reshape(x.shape) if len(groups) else x

    def moe(self, p: str, x: Array) -> Array:
        c = self.c
        out = np.zeros_like(x)
        for t in range(len(x)):
            scores = np.sqrt(np.log1p(np.exp(x[t] @ self.w[p + "gate.weight"].T)))
            chosen = np.argsort(-(scores + self.w[p + "gate.bias"]), kind="stable")[: c["num_experts_per_tok"]]
            for e in chosen:
                share = c["routed_scaling_factor"] * scores[e] / (scores[chosen].sum() + 1e-20)
                out[t] += share * self.expert(f"{p}experts.{e}.", x[t])
            out[t] += self.expert(p + "shared_experts.", x[t])
        return out

    def expert(self, p: str, x: Array) -> Array:
        limit = self.c["swiglu_limit"]
        g = np.minimum(self.linear(p + "w1", x), limit)
        u = np.clip(self.linear(p + "w3", x), -limit, limit)
        return self.linear(p + "w2", g / (1 + np.exp(-g)) * u)


def rounded(x: Array, kind: str) -> Array:
    """One group, to 8 or 4 bits and back."""
    most = np.abs(x).max()
    if kind == "fp8":
        s = 2.0 ** math.ceil(math.log2(max(most, 1e-4) * float(np.float32(1 / 448))))
        return e4m3(x / s) * s
    if kind == "fp4":
        s = 2.0 ** math.ceil(math.log2(max(most, 6 * 2.0**-126) * float(np.float32(1 / 6))))
    else:
        s = float(e4m3(np.array([max(most, 6 * 2.0**-9) / 6]))[0])
    return e2m1(x / s) * s


def e4m3(v: Array) -> Array:
    """Nearest of sign, 4 bits of exponent and 3 of mantissa; ties to even."""
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(v), 1e-30))), -6) - 3)
    return np.clip(np.rint(v / step) * step, -448.0, 448.0)


def e2m1(v: Array) -> Array:
    """Nearest of eight magnitudes; ties to the even code."""
    apart = np.abs(GRID - np.minimum(np.abs(v), 6.0)[:, None])
    apart[:, 1::2] += 1e-12  # an odd code only where it is nearer
    return np.copysign(GRID[apart.argmin(1)], v)

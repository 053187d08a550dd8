"""Engram (DeepSeek-V4.1): rows of a large table, found by hashes of the last tokens, added to every stream by a gate.

    e_2 = t_0 m_0 ^ t_1 m_1,  e_3 = e_2 ^ t_2 m_2, ...           t_s: folded id of the token s places back
    row(n, head) = e_n mod prime(n, head) + first row of this column
    key, value = split(wkv [rows side by side])
    gate_i = sigmoid(signed sqrt of <norm(h_i) q_i, norm(key_i) k_i> / sqrt(hidden));  h_i += gate_i value

B texts, T tokens, N streams, C columns of hashes (heads of every n). A table has up to 95 GiB and is never in memory:
its rows are gathered. Left out: images, at which n-grams end and nothing is added. Source: DeepSeek-V4.1-Flash,
inference/engram.py.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.models.config import Engram
from deepseek_compress.models.token_map import token_map
from deepseek_compress.models.weights import Weights
from deepseek_compress.models.wide import wide

TABLE = "engram.embed.weight"
SEED = 10007
LEAST_DOT = 1e-6  # under the root
# The published layers' multipliers as numbers: another version of numpy may draw others, which would hash otherwise
PUBLISHED = {
    (1, 99092): (76632096046245, 4839876093313, 35959672319349, 73987337458391),
    (14, 99092): (67716810739261, 51510806800915, 30921347202721, 82619226485591),
}


@lru_cache(maxsize=4)
def primes(engram: Engram) -> tuple[tuple[int, ...], ...]:
    """For each layer the modulus of every column: rising primes from `vocabulary` on, none of them used twice."""
    columns, number, found = (engram.ngrams - 1) * engram.heads, engram.vocabulary, list[tuple[int, ...]]()
    for _ in engram.layers:
        mine: list[int] = []
        while len(mine) < columns:
            if _is_prime(number):
                mine.append(number)
            number += 1
        found.append(tuple(mine))
    return tuple(found)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def multipliers(layer: int, tokens: int, count: int) -> tuple[int, ...]:
    """Return the odd factors of a layer's hashes, small enough that a product with a folded id stays below 2^63."""
    if (layer, tokens) in PUBLISHED and count == 4:
        return PUBLISHED[layer, tokens]
    return drawn(layer, tokens, count)


def drawn(layer: int, tokens: int, count: int) -> tuple[int, ...]:
    """Return the same, from the generator that the published code uses."""
    most = max(1, ((2**63 - 1) // tokens) // 2)
    return tuple(int(n) for n in np.random.default_rng(SEED * layer).integers(0, most, count, dtype=np.int64) * 2 + 1)


def hashed_rows(engram: Engram, layer: int, folded: Tensor, pad: int) -> Tensor:
    """folded int64 (B, T), whole texts -> rows of the layer's table, int64 (B, T, C)."""
    moduli = torch.tensor(primes(engram)[engram.layers.index(layer)], device=folded.device)
    starts = moduli.cumsum(0) - moduli
    factors = multipliers(layer, engram.tokens, engram.ngrams)
    columns, mixed = [], folded * factors[0]
    for back in range(1, engram.ngrams):
        before = torch.full_like(folded, pad)
        before[:, back:] = folded[:, : max(0, folded.shape[1] - back)]
        mixed = mixed ^ (before * factors[back])
        mine = slice((back - 1) * engram.heads, back * engram.heads)
        columns.append(mixed.unsqueeze(-1) % moduli[mine] + starts[mine])
    return torch.cat(columns, dim=-1)


def table_rows(engram: Engram, layer: int, tokens: Tensor) -> Tensor:
    """Token ids int64 (B, T), whole texts -> rows of the layer's table, int64 (B, T, C)."""
    if engram.folder is None:
        raise DscError("Engram needs tokenizer.json to find its rows", "give the directory of the checkpoint")
    folds = token_map(engram.folder, engram.tokens)
    last = max(engram.pad_token, int(tokens.max()) if tokens.numel() else 0)
    if last >= len(folds):
        raise DscError(f"token {last}: the tokenizer has {len(folds)}", "give the tokenizer.json of this checkpoint")
    return hashed_rows(engram, layer, folds.to(tokens.device)[tokens], int(folds[engram.pad_token]))


def engram_part(engram: Engram, layer: int, weights: Weights, streams: Tensor, tokens: Tensor, eps: float) -> Tensor:
    """streams (B, T, N, hidden) of tokens (B, T) -> streams with what the table adds."""
    batch, length, n, hidden = streams.shape
    places = table_rows(engram, layer, tokens)
    found = weights.rows(TABLE, places.flatten()).to(streams.device).view(batch, length, -1)
    kv = weights.linear("engram.wkv", found)
    h, key, value = wide(streams), wide(kv[..., : n * hidden]).view(batch, length, n, hidden), wide(kv[..., -hidden:])
    both = weights["engram.q_weight"].to(h.dtype) * weights["engram.k_weight"].to(h.dtype)  # (N, hidden)
    dot = (h * both * key).sum(-1) * _inverse_rms(h, eps) * _inverse_rms(key, eps) * hidden**-0.5
    gate = torch.sigmoid(torch.copysign(dot.abs().clamp(min=LEAST_DOT).sqrt(), dot))
    return (h + gate.unsqueeze(-1) * value.unsqueeze(2)).to(streams.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1) + eps)

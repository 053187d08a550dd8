"""Keys and values of the tokens seen so far, for generation; and how a cache of few bits changes what attention reads.

Here the rounded values are held unpacked: what they do to the model is measured, and the bytes of a packed cache are
counted (`cache_bytes`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.models.attend import attend
from deepseek_compress.models.config import ModelConfig
from deepseek_compress.models.kept_tokens import KeptTokens, Pairs
from deepseek_compress.numerics.kv_cache import KvRounding
from deepseek_compress.registry import build


class KvCache:
    """Per block, tensors (B, heads, capacity, channels) that grow along their third dimension.

    Memory is taken at the first token of a block, for `capacity` tokens; with None nothing is kept, for a whole text
    run at once. `length` is advanced by the caller after all blocks have seen the new tokens. Not differentiable.
    `int8`: attention computes with what it reads in 8 bits.
    """

    def __init__(
        self, num_layers: int, capacity: int | None, rounding: KvRounding | None = None, int8: bool = False
    ) -> None:
        self.capacity = capacity
        self.int8 = int8
        self.rounding = rounding
        self.length = 0
        self.layers: list[tuple[Tensor, ...]] = [() for _ in range(num_layers)]
        self.heads: int | None = None  # entries a token has in a block
        self.kept: dict[int, KeptTokens] = {}  # by block, where only some tokens are kept
        self._last: dict[int, Tensor] = {}  # block -> (B, heads, channels), the last key as it is stored

    def rounded(self, layer: int, positions: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Rotated keys and values (or latents) of new tokens, each (B, heads, T, channels), as they would be stored.

        `positions` (B, T): places of the tokens in their texts. With `rest` both as they are kept, then both as they
        are when they no longer are.
        """
        how = self.rounding
        if how is None:
            return key, value
        if self.heads is None:
            self.heads = key.shape[1]
        if not how.rest:
            key = how.keys(key, positions, self._last.get(layer))
            self._last[layer] = key[:, :, -1]
            return key, how(value)
        first = how.coarse.keys(key, positions, self._last.get(layer))
        self._last[layer] = first[:, :, -1]
        return first + how.coarse(key - first), how(value), first, how.coarse(value)

    def attend(
        self,
        layer: int,
        positions: Tensor,
        pairs: Pairs,
        values: Tensor,
        scale: float,
        mask: Tensor | None,
        rest: tuple[Pairs, Tensor] | None,
    ) -> Tensor:
        """`layers.attend` over what `update` gave back; see `KeptTokens` where only some tokens are kept."""
        if self.rounding is None or self.rounding.window is None:
            return attend(pairs, values, scale, mask, int8=self.int8)
        if layer not in self.kept or self.capacity is None:
            assert self.heads is not None
            self.kept[layer] = KeptTokens(self.rounding, len(values), self.heads)
        return self.kept[layer].attend(positions, pairs, values, scale, mask, rest)

    def update(self, layer: int, *new: Tensor) -> tuple[Tensor, ...]:
        """Append `new`, each (B, heads, T, channels); give back all that is known, each (B, heads, S, channels)."""
        if self.capacity is None:
            return new
        if not self.layers[layer]:
            self.layers[layer] = tuple(x.new_empty(*x.shape[:2], self.capacity, x.shape[3]) for x in new)
        end = self.length + new[0].shape[2]
        for kept, x in zip(self.layers[layer], new, strict=True):
            kept[:, :, self.length : end] = x
        return tuple(kept[:, :, :end] for kept in self.layers[layer])

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows of the batch, (rows,) integers in rising order."""
        for index, tensors in enumerate(self.layers):
            self.layers[index] = tuple(self._compact(kept, rows) for kept in tensors)
        self._last = {layer: last[rows] for layer, last in self._last.items()}
        for kept in self.kept.values():
            kept.keep_rows(rows)

    def _compact(self, kept: Tensor, rows: Tensor) -> Tensor:
        out = torch.empty(len(rows), *kept.shape[1:], dtype=kept.dtype, device=kept.device)
        out[:, :, : self.length] = kept[rows, :, : self.length]
        return out


class CacheBytes(NamedTuple):
    """Bytes of a token in the caches of all blocks, as engines keep them: latent attention its latent."""

    plain: int  # at 16 bits
    stored: float


def cache_bytes(cfg: ModelConfig, rounding: KvRounding | None, tokens: int | None = None) -> CacheBytes | None:
    """Bytes a token; None for families whose cache is not one entry a token. An indexer's keys stay 16-bit.

    tokens: length of a text over all tokens of which the mean is taken; None: of a token that is kept.
    """
    if cfg.compressed is not None:
        return None
    kept = cfg.indexer.head_dim if cfg.indexer else 0
    vectors = [channels for _, channels in _vectors(cfg)]
    each = (2.0 * n if rounding is None else rounding.mean_bytes(n, tokens or 1) for n in vectors)
    stored = sum(each)
    return CacheBytes(cfg.num_hidden_layers * 2 * (sum(vectors) + kept), cfg.num_hidden_layers * (stored + 2 * kept))


def kv_rounding(manifest: Mapping[str, Any] | None) -> KvRounding | None:
    """Return the scheme that a manifest's `kv_cache` describes; None stays None. Raises `DscError` for an unknown
    one."""
    return None if manifest is None else build(KvRounding, manifest, "kv_cache")


def cache_problems(cfg: ModelConfig, rounding: KvRounding) -> list[DscError]:
    """Why the model's cache cannot be rounded like that."""
    if cfg.compressed is not None:
        what = f"kv_cache: {cfg.model_type} keeps entries of many tokens, not rounded here"
        return [DscError(what, "set kv_cache: null")]
    if cfg.indexer is not None and rounding.window is not None:
        return [DscError(f"kv_cache: {cfg.model_type} chooses tokens by its own indexer", "leave window out")]
    vectors = _vectors(cfg)
    fits = [size for size in (128, 64, 32, 16) if all(channels % size == 0 for _, channels in vectors)]
    return [
        DscError(
            f"kv_cache: {what} of {channels} channels do not divide into groups of {rounding.group_size}",
            f"set group_size: {fits[0]}" if fits else "leave group_size out",
        )
        for what, channels in dict.fromkeys(vectors)
        if rounding.group_size and channels % rounding.group_size
    ]


def cache_note(cfg: ModelConfig, rounding: KvRounding) -> str:
    """Return what the scheme saves and who keeps to it, in one line."""
    size = cache_bytes(cfg, rounding)
    assert size is not None
    deltas = _kept_note(rounding)
    deltas += ", keys as differences of neighbouring tokens (an addition a value to read)" if rounding.delta else ""
    return (
        f"KV cache of {rounding.num_bits} bits: {size.stored:.0f} bytes a token, {size.plain} in 16 bits{deltas}; it "
        "stands in the manifest and is evaluated; serving engines ignore it, "
        "set theirs at launch (see README.md of the output)"
    )


def _kept_note(rounding: KvRounding) -> str:
    if rounding.window is None:
        return ""
    others = "others in 4 bits" if rounding.rest else "others dropped"
    kept = f"the {rounding.window} newest, {rounding.sinks} first, {rounding.important} important"
    return f" that is kept ({kept}; {others})"


def _vectors(cfg: ModelConfig) -> list[tuple[str, int]]:
    """Return what a block keeps of a token, and how many channels each has."""
    if cfg.mla is not None:
        return [("latents", cfg.mla.kv_lora_rank), ("rotated keys", cfg.mla.rope)]
    return [("heads", cfg.head_dim)] * (2 * cfg.num_key_value_heads)

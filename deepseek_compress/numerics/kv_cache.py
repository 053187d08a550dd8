"""Keys and values on few bits: each token and head has grids of its own, made when the token enters the cache.

Groups of neighbouring channels share a scale, rounded to BF16, and a whole zero point, so that
`y = (round(x / s) clamped - z) s` and a zero stays a zero; no calibration. Latent attention keeps a latent and one
rotated key a token instead: each is treated as one head.

`delta`: what is rounded of a key is its difference to the token before as it is stored, so that errors do not add up,

    y_t = y_{t-1} + Q(x_t - y_{t-1}),    every ANCHOR-th token y_t = Q(x_t)

in the same bytes. Keys have channels that are large in every token; values and latents don't, and their differences
are larger than they are (SmolLM2-135M at 4 bits: squared error of keys 0.017 -> 0.005, of values 0.0106 -> 0.0130; KL
0.113 -> 0.039), so they are rounded as they are. Reading costs one addition a value of a key where the cache is read in
order; to read one token alone, up to ANCHOR - 1 before it are read too.

`window`, `sinks` and `important` say which tokens of a text are kept as they are stored: the newest, the first (Xiao et
al. 2024), and those on which attention has put most weight so far (H2O: Zhang et al. 2023). The others are dropped, or
with `rest: 4` stay in 4 bits. There a token enters in two layers of 4 bits, what the first one loses rounded again,

    y = Q4(x), kept tokens y + Q4(x - y)

so that a token which is no longer kept gives its second layer back and nothing is rounded twice; differences are those
of the first layer. Which tokens are kept is decided once every EVERY tokens (see `models.kept_tokens`), so that up to
EVERY - 1 more are held.

Left out: grids that several tokens share, a channel at a time (KIVI's keys), which want the newest tokens in 16 bits.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.numerics import grid

ANCHOR = 16  # tokens of which the first stands alone
EVERY = 64  # tokens after which it is decided again which are kept
SCALE_BITS = 16


class KvRounding(BaseModel, frozen=True, extra="forbid"):
    """Keys and values on 8 or 4 bits: each token and head gets grids of its own as it comes, no calibration."""

    paper: ClassVar[str] = (
        "Sheng et al. 2023, FlexGen (section 4, group-wise), arXiv 2303.06865; "
        "deltas: Liu et al. 2023, CacheGen (section 5.1), arXiv 2310.07240; "
        "sinks: Xiao et al. 2024, arXiv 2309.17453; important tokens: Zhang et al. 2023, H2O, arXiv 2306.14048"
    )
    num_bits: Literal[4, 8, 16] = 8  # 16: not rounded, of the tokens that are kept
    group_size: int | None = Field(None, gt=0)  # channels that share a scale; None: 128, 64 or 32 that fits, or all
    delta: bool = False  # keys as differences between neighbouring tokens
    window: int | None = Field(None, ge=1)  # newest tokens that are kept; None: all tokens are
    sinks: int = Field(4, ge=0)  # first tokens that are kept, with a window
    important: int = Field(0, ge=0)  # further tokens that are kept, by the attention they got
    rest: Literal[0, 4] = 0  # bits of all others; 0: dropped

    @model_validator(mode="after")
    def _goes_together(self) -> KvRounding:
        if self.window is None and (self.important or self.rest or self.num_bits == 16):
            raise DscError("kv_cache: important, rest and num_bits: 16 go with a window", "give window")
        if self.rest and self.num_bits != 8:
            raise DscError(f"kv_cache: rest: 4 with {self.num_bits} bits", "set num_bits: 8, two layers of 4")
        if self.delta and (self.num_bits == 16 or (self.window is not None and not self.rest)):
            raise DscError(
                "kv_cache: differences to tokens that are dropped, or to none", "set rest: 4, or delta: false"
            )
        return self

    @property
    def coarse(self) -> KvRounding:
        """The first layer alone: what is left of a token that is not kept."""
        return self.model_copy(update={"num_bits": 4, "window": None, "important": 0, "rest": 0})

    def document(self) -> dict[str, Any]:
        """As a manifest carries it; which tokens are kept stands there where not all are."""
        unsaid = {"window", "sinks", "important", "rest"} if self.window is None else set[str]()
        return self.model_dump(mode="json", exclude=unsaid)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (..., channels), a token and head a row, as the cache gives it back, in its type."""
        if self.num_bits == 16:
            return x
        if self.rest:
            first = self.coarse(x)
            return first + self.coarse(x - first)
        size = grid.fit_group_size(x.shape[-1], self.group_size)
        groups = x.float().reshape(*x.shape[:-1], -1, size)
        found = grid.fit(groups.amin(-1), groups.amax(-1), self.num_bits, symmetric=False)
        scale, zero = found.scale.unsqueeze(-1), found.zero_point.unsqueeze(-1)
        return (groups / scale).round_().clamp_(-zero, found.top - zero).mul_(scale).view(x.shape).to(x.dtype)

    def keys(self, x: Tensor, positions: Tensor, before: Tensor | None) -> Tensor:
        """Return the same of rotated keys `x` (B, heads, T, channels) at `positions` (B, T) of their texts.

        `before` (B, heads, channels): the key before the first one as it is stored; None where there is none.
        """
        if not self.delta:
            return self(x)
        alone = (positions % ANCHOR == 0)[:, None, :, None]  # (B, 1, T, 1)
        stored, last = torch.empty_like(x), torch.zeros_like(x[:, :, 0]) if before is None else before
        for t in range(x.shape[2]):
            last = last.masked_fill(alone[:, :, t], 0)
            last = last + self(x[:, :, t] - last)
            stored[:, :, t] = last
        return stored

    def bytes(self, channels: int) -> float:
        """Bytes that `channels` values of one kept token and head take, scales and zero points included."""
        if self.num_bits == 16:
            return 2.0 * channels
        if self.rest:
            return 2 * self.coarse.bytes(channels)
        groups = channels // grid.fit_group_size(channels, self.group_size)
        return (channels * self.num_bits + groups * (SCALE_BITS + self.num_bits)) / 8

    def mean_bytes(self, channels: int, tokens: int) -> float:
        """Return the same, the mean over all tokens of a text of `tokens`, where most are held between two
        decisions."""
        kept = tokens if self.window is None else min(tokens, self.sinks + self.important + self.window + EVERY - 1)
        others = self.coarse.bytes(channels) if self.rest else 0.0
        return (kept * self.bytes(channels) + (tokens - kept) * others) / tokens

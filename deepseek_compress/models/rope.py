"""Rotary position embedding: frequencies of the published scalings, and the rotation.

`default`: f_i = theta^(-2i/dim). `linear`: f_i / factor. `llama3`: only long waves are stretched (Llama 3.1 model
card). `yarn`: a ramp between stretched and unstretched frequencies (arXiv 2309.00071, section 3.2), with DeepSeek's
`mscale` (section 3.4): cos and sin are multiplied by mscale/mscale_all_dim, the softmax scale by mscale_all_dim^2.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from deepseek_compress.models.config import Rope


def yarn_mscale(factor: float, mscale: float) -> float:
    """Return the temperature of yarn: 0.1 * mscale * ln(factor) + 1, and 1 without stretching."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(rope: Rope, head_dim: int) -> float:
    """Return what attention scores are multiplied with: head_dim^-1/2, and mscale_all_dim squared where it is set."""
    scale = head_dim**-0.5
    if rope.kind != "default" and rope.mscale_all_dim:
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    return float(scale)


def frequencies(rope: Rope) -> tuple[Tensor, float]:
    """Angle per position of each pair, float32 (dim/2,), and the factor for cos and sin."""
    powers = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    plain = 1.0 / (rope.theta**powers)
    if rope.kind == "linear":
        return plain / rope.factor, 1.0
    if rope.kind == "llama3":
        return _llama3(rope, plain), 1.0
    if rope.kind == "yarn":
        return _yarn(rope, plain), _yarn_attention_factor(rope)
    return plain, 1.0


def _llama3(rope: Rope, plain: Tensor) -> Tensor:
    wavelength = 2 * math.pi / plain
    longest = rope.original_length / rope.low_freq_factor
    shortest = rope.original_length / rope.high_freq_factor
    smooth = (rope.original_length / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - smooth) * plain / rope.factor + smooth * plain
    stretched = torch.where(wavelength > longest, plain / rope.factor, plain)
    return torch.where((wavelength >= shortest) & (wavelength <= longest), between, stretched)


def _yarn(rope: Rope, plain: Tensor) -> Tensor:
    def turning(rotations: float) -> float:
        """Return the channel that rotates `rotations` times over the original length."""
        length = rope.original_length / (rotations * 2 * math.pi)
        return rope.dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = turning(rope.beta_fast), turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = ((torch.arange(rope.dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    # 1 / (factor * t) rather than (1 / t) / factor: the same rounding as the published code
    stretched = 1.0 / (rope.factor * rope.theta ** (torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim))
    return stretched * ramp + plain * (1 - ramp)


def _yarn_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)
    return yarn_mscale(rope.factor, 1.0)


@lru_cache(maxsize=8)
def _table(rope: Rope, length: int, device: str) -> tuple[Tensor, Tensor]:
    angle, factor = frequencies(rope)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * angle
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def places(texts: int, first: int, count: int, device: torch.device) -> Tensor:
    """Return the positions `first`, `first` + 1, ... of `count` tokens in each of `texts`, int64 (texts, count)."""
    return known(torch.arange(first, first + count, device=device).expand(texts, -1), first + count - 1)


def known(positions: Tensor, last: int) -> Tensor:
    """`positions`, none of which is beyond `last`: a GPU would be waited for to find that out."""
    positions.last = last  # type: ignore[attr-defined]
    return positions


def cos_sin(rope: Rope, positions: Tensor) -> tuple[Tensor, Tensor]:
    """`positions` (B, T) -> cos and sin, float32 (B, 1, T, dim/2): the 1 is for the heads."""
    last = getattr(positions, "last", None)
    if last is None:
        last = int(positions.max()) if positions.numel() else 0
    cos, sin = _table(rope, max(256, 1 << last.bit_length()), str(positions.device))
    return cos[positions].unsqueeze(1), sin[positions].unsqueeze(1)


def rotate(rope: Rope, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs of `x` (B, H, T, dim) by the angles of `cos_sin`; the first half of the result holds the first
    channel of every pair, for both layouts: scores don't depend on the order as long as queries and keys share it."""
    if rope.interleaved:
        first, second = x[..., 0::2], x[..., 1::2]
    else:
        first, second = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

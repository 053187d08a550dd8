"""Attention with both products in 8 bits around a softmax that is not: the mixed-precision rule.

    scores = (q8 k8^T) (s_q s_k) scale      8 bits times 8 bits, one scale a token on both sides
    p8, s_p = softmax(scores)               maximum and sum in float32, rounded once to unsigned 8 bits, one scale a row
    out = (p8 v8) (s_p s_v)                 one scale a channel of the values, over the tokens that the last query sees

The scales of rows and columns leave the sums, so that both products are integers; the softmax takes the int32 ones with
their scales (`cuda_ops.softmax`). As in SageAttention (Zhang et al. 2024, arXiv 2410.02367, section 4) for the scores
and SageAttention2 (arXiv 2411.10958, section 3.3) for values by channel, without their smoothing of keys. Here integers
are held in float32, exact for 1,040 channels and for 518 tokens seen, and to 2^-24 beyond.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cuda_ops import ops
from deepseek_compress.numerics.activations import SMALLEST

_TOP = 127.0


def attend_int8(
    pairs: Sequence[tuple[Tensor, Tensor]], values: Tensor, scale: float, mask: Tensor | None, rows_at_once: int
) -> Tensor:
    """Return what `layers.attend` gives, its products rounded; same shapes. Of `mask` it counts what is -inf and what
    is not.

    `rows_at_once`: queries of each head whose scores are held together.
    """
    batch, heads, new, _ = pairs[0][0].shape
    groups, seen = max(k.shape[1] for _, k in pairs), values.shape[2]
    queries = torch.cat([q for q, _ in pairs], dim=-1)
    keys = torch.cat([k.expand(-1, groups, -1, -1) for _, k in pairs], dim=-1)
    q8, q_scale = _rounded(queries, -1)
    k8, k_scale = _rounded(keys, -1)
    taken = visible(mask, new, seen, values.device)
    v8, v_scale = _rounded(values, -2, taken[:, :, -1, :, None])  # padding, which nothing else sees, has no say
    parts = []
    for start in range(0, new, rows_at_once):
        rows = slice(start, min(start + rows_at_once, new))
        own = q8[:, :, rows].reshape(batch, groups, -1, q8.shape[-1])
        logits = (own @ k8.mT).to(torch.int32).view(batch, heads, -1, seen)
        by_column = k_scale[..., 0].repeat_interleave(heads // groups, dim=1)  # (B, H, S)
        p8, p_scale = ops.softmax(logits, q_scale[:, :, rows, 0] * scale, by_column, taken[:, :, rows], torch.uint8)
        weights = p8.float().view(batch, values.shape[1], -1, seen)
        out = (weights @ v8).mul_(v_scale).view(batch, heads, -1, values.shape[-1])
        parts.append((out * p_scale).to(values.dtype))
    return torch.cat(parts, dim=2)


def visible(mask: Tensor | None, new: int, seen: int, device: torch.device) -> Tensor:
    """bool (B or 1, 1, T, S): where a query may look; `mask` additive, None means causal."""
    if mask is not None:
        return mask > float("-inf")
    place = torch.arange(seen, device=device)
    return (place <= place[seen - new :, None])[None, None]


def _rounded(x: Tensor, dim: int, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Integers of -127 to 127 in float32, and their scales over `dim`, which is kept; of what is `counted`."""
    wide = x.float()
    sizes = wide.abs() if counted is None else wide.abs().masked_fill(~counted, 0)
    scale = sizes.amax(dim, keepdim=True) / _TOP
    scale = torch.where(scale > SMALLEST, scale, torch.ones_like(scale))
    return (wide / scale).round_().clamp_(-_TOP, _TOP), scale

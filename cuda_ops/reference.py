"""The slow, obvious versions that decide what the kernels must give, in plain torch.

They are also what runs where the native code cannot be built.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
MXFP4_BLOCK = 32
SMALLEST_SCALE = 1e-30  # below this the group is all zeros


def decode(weight: Tensor, scale: Tensor | None, block: tuple[int, int]) -> Tensor:
    """Stored weight -> float32 (rows, columns).

    float8_e4m3fn with a scale a block (DeepSeek-V3 README_WEIGHTS: multiply); uint8 or int8 nibbles (low first) with
    E8M0 exponents per 32 (OCP Microscaling v1.0); float32, float16 and bfloat16 as they are.
    """
    if scale is None:
        return weight.float()
    if weight.dtype == torch.float8_e4m3fn:
        rows, columns = weight.shape
        per_element = scale.float().repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        return weight.float() * per_element
    codes = weight.view(torch.uint8)
    values = torch.tensor(E2M1)[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).long()]
    exponent = scale.view(torch.uint8).int() - 127
    power = torch.ldexp(torch.ones(exponent.shape), exponent)
    power = torch.where(exponent == 128, torch.full_like(power, torch.nan), power)
    return values * power.repeat_interleave(MXFP4_BLOCK, 1)


def quantize(weight: Tensor, group_size: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """float32 (rows, columns) -> codes uint8 (rows, columns), scale bfloat16 and zero point uint8 (rows, groups).

    Asymmetric: scale = (max - min) / 15 with min <= 0 <= max, zero = round(-min / scale). Symmetric: scale =
    max(min / -8, max / 7), zero = 8. A scale not above 1e-30 becomes 1; it is rounded to BF16 before use.
    code = round(w / scale) + zero. Zero and code are clamped to 0..15; ties go to even.
    """
    rows, columns = weight.shape
    groups = weight.reshape(rows, columns // group_size, group_size)
    low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
    scale = torch.maximum(low / -8, high / 7) if symmetric else (high - low) / 15
    stored = torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale)).bfloat16()
    scale = stored.float()
    zero = torch.full_like(scale, 8) if symmetric else (low / -scale).round().clamp(0, 15)
    codes = ((groups / scale[..., None]).round() + zero[..., None]).clamp(0, 15)
    return codes.to(torch.uint8).view(rows, columns), stored, zero.to(torch.uint8)


def pack_rows(codes: Tensor) -> Tensor:
    """4-bit codes uint8 (rows, columns) -> int32 (rows, ceil(columns / 8)), low nibble first, padded with zeros."""
    rows, columns = codes.shape
    padded = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.uint8)
    padded[:, :columns] = codes
    pairs = padded[:, 0::2] | padded[:, 1::2] << 4
    return pairs.contiguous().view(torch.int32)


def pack_weights(
    weight: Tensor, scale: Tensor | None, block: tuple[int, int], group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """The operator's contract: packed codes, scale, zero points packed along rows, first row not finite or -1."""
    values = decode(weight, scale, block)
    codes, stored, zero = quantize(values, group_size, symmetric)
    groups = values.view(values.shape[0], -1, group_size)
    width = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    bad = (~(values.isfinite().all(1) & width.isfinite().all(1))).nonzero()
    return pack_rows(codes), stored, pack_rows(zero.T.contiguous()).T.contiguous(), int(bad[0]) if len(bad) else -1


def softmax(
    logits: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, mask: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The operator's contract in double precision, rounded once to `out_dtype`; see `ops.softmax`."""
    values = logits.double()
    if row_scale is not None:
        values = values * row_scale.double().view(*logits.shape[:-1], 1)
    if column_scale is not None:
        columns = column_scale.double()
        values = values * (columns if columns.numel() == logits.shape[-1] else columns.unsqueeze(-2))
    if mask is not None and mask.dtype == torch.int32:
        ranges = mask.view(*logits.shape[:-1], 2)
        column = torch.arange(logits.shape[-1], device=logits.device)
        mask = (column >= ranges[..., :1]) & (column < ranges[..., 1:])
    if mask is not None:
        values = values.masked_fill(~mask, -torch.inf)
    largest = values.amax(-1, keepdim=True)
    exponentials = (values - torch.where(largest == -torch.inf, 0.0, largest)).exp()
    total = exponentials.sum(-1, keepdim=True)
    probability = torch.where(total == 0, 0.0, exponentials / total)
    if out_dtype != torch.uint8:
        return probability.to(out_dtype), logits.new_empty(0, dtype=torch.float32)
    scale = probability.amax(-1, keepdim=True) / 255
    codes = (probability / torch.where(scale == 0, 1.0, scale)).round().to(torch.uint8)
    return codes, scale.float()

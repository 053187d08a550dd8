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
    """Return stored weight -> float32 (rows, columns).

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
    values = torch.tensor(E2M1, device=weight.device)[torch.stack((codes & 15, codes >> 4), dim=-1).flatten(1).long()]
    exponent = scale.view(torch.uint8).int() - 127
    power = torch.ldexp(torch.ones(exponent.shape, device=weight.device), exponent)
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
    padded = torch.zeros(rows, -(-columns // 8) * 8, dtype=torch.uint8, device=codes.device)
    padded[:, :columns] = codes
    pairs = padded[:, 0::2] | padded[:, 1::2] << 4
    return pairs.contiguous().view(torch.int32)


def pack_weights(
    weight: Tensor, scale: Tensor | None, block: tuple[int, int], group_size: int, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return the operator's contract: packed codes, scale, zero points packed along rows, first row not finite or
    -1."""
    values = decode(weight, scale, block)
    codes, stored, zero = quantize(values, group_size, symmetric)
    groups = values.view(values.shape[0], -1, group_size)
    width = groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)
    bad = (~(values.isfinite().all(1) & width.isfinite().all(1))).nonzero()
    return pack_rows(codes), stored, pack_rows(zero.T.contiguous()).T.contiguous(), int(bad[0]) if len(bad) else -1


def fit(low: Tensor, high: Tensor, num_bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scale (rounded to BF16, held as float32) and zero point of the grid that spans low .. high, widened to hold 0."""
    top, low, high = 2**num_bits - 1, low.clamp(max=0), high.clamp(min=0)
    middle = (top + 1) // 2
    scale = torch.maximum(low / -middle, high / (top - middle)) if symmetric else (high - low) / top
    scale = torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale)).bfloat16().float()
    return scale, torch.full_like(scale, middle) if symmetric else (low / -scale).round_().clamp_(0, top)


def search_grid(
    groups: Tensor, importance: Tensor | None, shrink: Tensor, num_bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return the operator's contract: scale and zero point (count, rows) for each of `groups` (count, size, rows).

    Of the ranges of a group times each of `shrink` (steps,), the first of them 1, the one with the least sum of
    `importance` (count, size) times the squared error; then the least-squares scale of its codes where that is better.
    """
    top, weighing = 2**num_bits - 1, None if importance is None else importance.unsqueeze(-1)
    low, high = groups.amin(-2), groups.amax(-2)
    scale, zero = fit(low, high, num_bits, symmetric)
    lowest = _grid_error(groups, weighing, scale, zero, top)
    for step in range(1, len(shrink) + 1):
        if step < len(shrink):
            other = fit(low * shrink[step], high * shrink[step], num_bits, symmetric)
        else:
            other = _refit(groups, weighing, scale, zero, top), zero
        found = _grid_error(groups, weighing, *other, top)
        wins = found < lowest
        scale, zero = torch.where(wins, other[0], scale), torch.where(wins, other[1], zero)
        lowest = torch.where(wins, found, lowest)
    return scale, zero


def _values(scaled: Tensor, zero: Tensor, top: int) -> Tensor:
    return scaled.round().clamp_(-zero.unsqueeze(-2), top - zero.unsqueeze(-2))


def _grid_error(groups: Tensor, importance: Tensor | None, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    scaled = groups / scale.unsqueeze(-2)
    off = _values(scaled, zero, top).sub_(scaled).square_()
    return total(off if importance is None else off.mul_(importance)).mul_(scale.square())


def _refit(groups: Tensor, importance: Tensor | None, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    codes = _values(groups / scale.unsqueeze(-2), zero, top)
    weighted = codes if importance is None else codes * importance
    fresh = total(weighted * groups) / total(weighted * codes).clamp(min=SMALLEST_SCALE)
    return torch.where(fresh > SMALLEST_SCALE, fresh, scale).bfloat16().float()


def total(x: Tensor) -> Tensor:
    """Return the sum over `size` of x (count, size, rows) in a fixed order: eight interleaved sums, then those by
    halves."""
    sums = torch.zeros_like(x[:, :8]) if x.shape[1] >= 8 else x.new_zeros(len(x), 8, x.shape[2])
    for start in range(0, x.shape[1], 8):
        part = x[:, start : start + 8]
        sums[:, : part.shape[1]] += part
    for half in (4, 2, 1):
        sums = sums[:, :half] + sums[:, half:]
    return sums[:, 0]


def round_columns(
    base: Tensor,
    target: Tensor,
    feedback: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    group: Tensor,
    fixed: Tensor | None,
    top: int,
    codes: Tensor,
    residual: Tensor,
) -> None:
    """Round column after column to its grid, what it misses fed to the later ones in that order: the contract.

    `base` (columns, rows): `target` after the feedback of all earlier columns; `feedback` (columns, columns) strictly
    lower; column j has the grid `group[j]` of `scale` and `zero_point` (groups, rows); True in `fixed` stays 0. Fills
    `codes` and `residual`, target - value. A product and a sum are two roundings: fused, the last bit would differ.
    With a leading dimension (matrices, ...), which then all tensors have, each matrix by itself.
    """
    if base.dim() == 3:
        for m, own_fixed in enumerate(fixed if fixed is not None else [None] * len(base)):
            grid = scale[m], zero_point[m], group[m]
            round_columns(base[m], target[m], feedback[m], *grid, own_fixed, top, codes[m], residual[m])
        return
    base = base.clone()
    for j, own in enumerate(group.tolist()):
        value = (base[j] / scale[own]).round_().clamp_(-zero_point[own], top - zero_point[own])
        if fixed is not None:
            value.masked_fill_(fixed[j], 0)
        torch.sub(target[j], value * scale[own], out=residual[j])
        codes[j] = value + zero_point[own]
        base[j + 1 :] += feedback[j + 1 :, j, None] * residual[j]


def unrounded(base: Tensor, target: Tensor, feedback: Tensor) -> Tensor:
    """Return the operator's contract: the columns (columns, rows) that are best when nothing more is rounded, `v =
    base + feedback (target - v)`, `feedback` (columns, columns) strictly lower; its products are added in their
    order. With a leading dimension, which then all have, each matrix by itself."""
    if base.dim() == 3:
        return torch.stack([unrounded(*parts) for parts in zip(base, target, feedback, strict=True)])
    values = base.clone()
    for j in range(len(values)):
        values[j + 1 :] += feedback[j + 1 :, j, None] * (target[j] - values[j])
    return values


def softmax(
    logits: Tensor, row_scale: Tensor | None, column_scale: Tensor | None, mask: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the operator's contract in double precision, rounded once to `out_dtype`; see `ops.softmax`."""
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

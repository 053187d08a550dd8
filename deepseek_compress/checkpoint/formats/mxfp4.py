"""MXFP4: E2M1 elements, two a byte, and one E8M0 scale for 32 of them: the routed experts of DeepSeek-V4.

    weight[i, j] = VALUES[nibble(i, j)] * 2 ** (scale[i, j // 32] - 127)

The low nibble is the even column (OCP Microscaling Formats v1.0, sections 5.3.3 and 5.4.1). Bit 3 is the sign; the
eight magnitudes are 0, 0.5, 1, 1.5, 2, 3, 4, 6. A scale byte of 255 is NaN and an error. On disk DeepSeek writes
`weight` I8 (rows, columns / 2) with `scale`; compressed-tensors' `mxfp4-pack-quantized` holds the same bytes as
`weight_packed` U8 with `weight_scale` U8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_compress.errors import DscError

GROUP = 32  # elements that share a scale
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = torch.tensor(MAGNITUDES + tuple(-m for m in MAGNITUDES))  # by nibble; 8 is minus zero
NAN_SCALE = 255
BIAS = 127
POWERS = torch.tensor([2.0 ** (byte - BIAS) for byte in range(NAN_SCALE)] + [float("nan")])  # by scale byte
EMAX = 2  # exponent of the largest magnitude, 6 = 1.5 * 2**2


def main_parts(parts: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(bytes uint8 (rows, columns / 2), scale uint8 (rows, columns / 32)), whichever names the parts have."""
    codes = parts["weight_packed"] if "weight_packed" in parts else parts["weight"]
    scale = parts["weight_scale"] if "weight_scale" in parts else parts["scale"]
    return codes.view(torch.uint8), scale.view(torch.uint8)


def decode_mxfp4(
    codes: Tensor,  # uint8 (rows, columns / 2)
    scale: Tensor,  # uint8 (rows, columns / 32), biased exponents
    dtype: torch.dtype = torch.float32,
    name: str = "weight",
) -> Tensor:
    """(rows, columns) in `dtype`. Every value is exact in bfloat16 within its exponent range."""
    bad = int((scale == NAN_SCALE).sum())
    if bad:
        raise DscError(f"{name}: {bad} of {scale.numel()} scales are NaN (byte 255)", "download the file again")
    pairs = torch.stack((VALUES.repeat(16), VALUES.repeat_interleave(16)), dim=1)  # (256, 2): low nibble first
    elements = pairs.to(codes.device)[codes.int()].view(codes.shape[0], -1, GROUP)
    return (elements * POWERS.to(codes.device)[scale.int()].unsqueeze(-1)).reshape(codes.shape[0], -1).to(dtype)


def encode_mxfp4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(bytes uint8 (rows, columns / 2), scale uint8 (rows, columns / 32)) nearest to `weight`, ties to even codes.

    The shared exponent is floor(log2(largest magnitude)) - 2 (OCP MX v1.0, section 6.3), so the largest may clip.
    """
    rows, columns = weight.shape
    groups = weight.float().view(rows, columns // GROUP, GROUP)
    absmax = groups.abs().amax(dim=-1)
    exponent = torch.frexp(absmax).exponent - 1 - EMAX
    exponent = torch.where(absmax > 0, exponent, torch.zeros_like(exponent)).clamp(-BIAS, BIAS)
    scaled = groups * POWERS[BIAS - exponent].unsqueeze(-1)
    grid = torch.tensor(MAGNITUDES)
    middles = (grid[1:] + grid[:-1]) / 2
    size = scaled.abs()
    code = torch.bucketize(size, middles)  # the smaller code on a tie ...
    tie = (code < 7) & (size == middles[code.clamp(max=6)]) & (code % 2 == 1)
    nibble = (code + tie) | (torch.signbit(scaled) & (size > 0)).long() << 3  # ... unless the larger is even
    nibble = nibble.to(torch.uint8).view(rows, columns // 2, 2)
    return nibble[..., 0] | nibble[..., 1] << 4, (exponent + BIAS).to(torch.uint8)

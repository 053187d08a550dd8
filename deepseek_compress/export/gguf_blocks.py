"""The types of GGUF that keep our codes. Blocks of 32 take the scale of the group they lie in, w = (q - z) s:

| our weight | GGUF type | a block of 32 | w' |
|---|---|---|---|
| 2 to 4 bits | Q4_1 | d, m in FP16, 32 codes of 4 bits | d q + m, d = fp16(s), m = fp16(-z d) |
| 4 bits, symmetric | Q4_0 | d in FP16, 32 codes of 4 bits | d (q - 8) |
| 8 bits, symmetric | Q8_0 | d in FP16, 32 codes of 8 bits | d (q - 128) |

so that |w' - w| <= |q - z| |d - s| + |m + z d|, and FP16 rounds x by at most max(2^-11 |x|, 2^-25): see `bound`.
Source: the format's description in ggml/docs/gguf.md, ggml-common.h.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deepseek_compress.checkpoint import TensorInfo
from deepseek_compress.checkpoint.formats.packed import stored_bits
from deepseek_compress.errors import DscError
from deepseek_compress.export.graph import Array
from deepseek_compress.numerics.types import Quantized

BLOCK = 32
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def kept_as(info: TensorInfo) -> str | None:
    """Return the type that keeps the codes of a packed weight; None where there is none."""
    columns = info.shape[1]
    bits = stored_bits(info)
    symmetric = "weight_zero_point" not in info.parts
    if columns // info.parts["weight_scale"].shape[1] % BLOCK:
        return None
    if bits == 8 and symmetric:
        return "Q8_0"
    return None if bits > 4 else "Q4_0" if bits == 4 and symmetric else "Q4_1"


def kind_of(info: TensorInfo) -> str:
    """Return the type of a tensor that is stored as it lies: codes where they fit, else `recoded`; vectors in FP32."""
    if info.encoding == "packed":
        return kept_as(info) or recoded(info.shape[1])
    wide = {torch.float32: "F32", torch.float16: "F16"}
    return "F32" if len(info.shape) == 1 else wide.get(info.dtype, "BF16")


def recoded(columns: int) -> str:
    """Return the type of values that come from codes without a type of their own."""
    return "BF16" if columns % BLOCK else "Q8_0"


def encode(weight: Tensor, kind: str) -> Array:
    """Values (rows, columns) or (n,) as a plain type or Q8_0, uint8 (rows, bytes of a row) or (bytes,)."""
    import gguf

    if kind == "Q8_0":
        data: Array = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    else:
        data = weight.to(PLAIN[kind]).contiguous().view(torch.uint8).numpy()
    return data


def bound(weight: Quantized) -> Tensor:
    """Bound the error of a weight that keeps its codes, (rows, columns): FP16 rounds d and m."""

    def half(value: Tensor) -> Tensor:
        return torch.clamp(2.0**-11 * value.abs(), min=2.0**-25)

    rows, columns = weight.codes.shape
    scale, zero = weight.scale.unsqueeze(-1), weight.zero_point.float().unsqueeze(-1)
    steps = (weight.codes.view(rows, weight.scale.shape[1], -1).float() - zero).abs()
    least = half(zero * (scale + half(scale))) if not weight.symmetric or weight.num_bits < 4 else 0.0
    return (steps * half(scale) + least).reshape(rows, columns)


def _halves(weight: Quantized) -> tuple[Array, Array]:
    """d of each block, FP16 (rows, blocks, 1), and the codes, uint8 (rows, blocks, 32)."""
    rows = len(weight.codes)
    d = weight.scale.half().repeat_interleave(weight.group_size // BLOCK, dim=1)
    if not bool(torch.isfinite(d).all()):
        raise DscError(f"a scale of {float(weight.scale.max()):g} is too large for FP16", "export compressed-tensors")
    return d.numpy()[..., None], weight.codes.numpy().reshape(rows, -1, BLOCK)


def _nibbles(codes: Array) -> Array:
    """(rows, blocks, 32) -> (rows, blocks, 16): code i of a block in the low half of byte i, 16 + i in the high."""
    packed: Array = codes[..., : BLOCK // 2] | (codes[..., BLOCK // 2 :] << 4)
    return packed


def _join(*pieces: Array) -> Array:
    """Pieces of each block, (rows, blocks, n) of any type, as uint8 (rows, bytes)."""
    joined = np.concatenate([np.ascontiguousarray(piece).view(np.uint8) for piece in pieces], axis=-1)
    return joined.reshape(len(joined), -1)


def _q4_1(weight: Quantized) -> Array:
    d, codes = _halves(weight)
    zero = weight.zero_point.float().repeat_interleave(weight.group_size // BLOCK, dim=1).numpy()[..., None]
    m = (-zero * d.astype(np.float32)).astype(np.float16)
    if not np.isfinite(m).all():
        raise DscError(f"a scale of {float(d.max()):g} is too large for FP16", "export compressed-tensors")
    return _join(d, m, _nibbles(codes))


def _q4_0(weight: Quantized) -> Array:
    d, codes = _halves(weight)
    return _join(d, _nibbles(codes))


def _q8_0(weight: Quantized) -> Array:
    d, codes = _halves(weight)
    return _join(d, (codes.astype(np.int16) - 128).astype(np.int8))


PACKED = {"Q4_1": _q4_1, "Q4_0": _q4_0, "Q8_0": _q8_0}

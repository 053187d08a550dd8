"""`pack-quantized`: compressed-tensors' integer weights of 1 to 8 bits (the form vLLM and transformers load).

| part | type, shape | content |
|---|---|---|
| weight_packed | int32 (rows, ceil(columns * bits / 32)) | codes of a row as one dense bitstream, lowest bits first |
| weight_scale | BF16 (rows, groups) | weight = (code - zero_point) * scale |
| weight_zero_point | int32 (ceil(rows * bits / 32), groups) | the same bitstream down the rows; absent when symmetric |
| weight_shape | int64 (2,) | rows, columns |

32 codes fill exactly `bits` words, so a code may straddle two words unless bits divides 32. A published code is signed
and stored plus 2**(bits-1), which is the unsigned code that `Quantized` holds. `int-quantized` (8 bits, symmetric,
`weight` int8) is read and written too. Source: compressed-tensors 0.20, compressors/pack_quantized and
compressors/naive_quantized. Left out: activation order and three-dimensional experts, which no server loads.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek_compress.checkpoint.header import Location, TensorInfo
from deepseek_compress.errors import DscError
from deepseek_compress.numerics.types import Quantized

_AGAIN = "download the checkpoint again"
SCALE_TYPES = (torch.bfloat16, torch.float16, torch.float32)
_WORD = 32  # bits; also how many codes fill a whole number of words
Shapes = dict[str, tuple[torch.dtype, tuple[int, ...]]]  # of stored parts: type and shape


def pack_rows(codes: Tensor, num_bits: int) -> Tensor:
    """uint8 (rows, columns) -> int32 (rows, ceil(columns * num_bits / 32)), code i at bit i * num_bits of its row."""
    if not 1 <= num_bits <= 8:
        raise ValueError(f"num_bits {num_bits} is not in 1..8")
    rows, columns = codes.shape
    words = -(-columns * num_bits // _WORD)
    padded = torch.nn.functional.pad(codes, (0, -columns % _WORD)).view(rows, -1, _WORD)
    if num_bits in (1, 2, 4, 8):
        return _pack_bytes(padded.reshape(rows, -1), num_bits)[:, :words].contiguous()
    out = torch.zeros(rows, padded.shape[1], num_bits, dtype=torch.int64, device=codes.device)
    for i in range(_WORD):
        word, bit = divmod(i * num_bits, _WORD)
        value = padded[..., i].long() << bit
        out[..., word] |= value & 0xFFFFFFFF
        if bit + num_bits > _WORD:
            out[..., word + 1] |= value >> _WORD
    return out.view(rows, -1)[:, :words].to(torch.int32)  # wraps modulo 2**32: the same bits


def unpack_rows(words: Tensor, num_bits: int, columns: int) -> Tensor:
    """int32 (rows, ceil(columns * num_bits / 32)) -> uint8 (rows, columns)."""
    rows = words.shape[0]
    if num_bits in (1, 2, 4, 8):
        return _unpack_bytes(words, num_bits)[:, :columns].contiguous()
    padded = torch.nn.functional.pad(words, (0, -words.shape[1] % num_bits)).view(rows, -1, num_bits)
    unsigned = padded.long() & 0xFFFFFFFF
    out = torch.empty(rows, padded.shape[1], _WORD, dtype=torch.uint8, device=words.device)
    for i in range(_WORD):
        word, bit = divmod(i * num_bits, _WORD)
        value = unsigned[..., word] >> bit
        if bit + num_bits > _WORD:
            value = value | unsigned[..., word + 1] << (_WORD - bit)
        out[..., i] = (value & (1 << num_bits) - 1).to(torch.uint8)
    return out.view(rows, -1)[:, :columns].contiguous()


def shapes_of(shape: tuple[int, ...], num_bits: int, group_size: int | None, symmetric: bool) -> Shapes:
    """Return what `pack_weight` gives for a weight of this shape (rows, columns), in its order; None: one group a
    row."""
    rows, columns = shape
    groups = columns // group_size if group_size else 1
    parts: Shapes = {"weight_packed": (torch.int32, (rows, -(-columns * num_bits // _WORD)))}
    parts["weight_scale"] = (torch.bfloat16, (rows, groups))
    if not symmetric:
        parts["weight_zero_point"] = (torch.int32, (-(-rows * num_bits // _WORD), groups))
    return {**parts, "weight_shape": (torch.int64, (2,))}


def pack_weight(weight: Quantized, scale_dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Return the stored parts of a quantised weight. Raises ValueError for scales that `scale_dtype` does not hold
    exactly."""
    scale = _exact(weight.scale, scale_dtype)
    parts = {"weight_packed": pack_rows(weight.codes, weight.num_bits), "weight_scale": scale}
    if not weight.symmetric:
        parts["weight_zero_point"] = pack_rows(weight.zero_point.T.contiguous(), weight.num_bits).T.contiguous()
    parts["weight_shape"] = torch.tensor(weight.codes.shape, dtype=torch.int64)
    return parts


def int8_parts(weight: Quantized, scale_dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """`int-quantized`: a symmetric 8-bit weight as plain int8 with its scales, which servers want for W8A8."""
    if weight.num_bits != 8 or not weight.symmetric:
        raise ValueError(f"int-quantized takes symmetric 8-bit weights, not {weight.num_bits} bits")
    return {"weight": (weight.codes ^ 128).view(torch.int8), "weight_scale": _exact(weight.scale, scale_dtype)}


def unpack_weight(name: str, parts: Mapping[str, Tensor]) -> Quantized:
    """Codes, scale and zero point from stored parts, whose shapes were checked when the headers were read."""
    scale = parts["weight_scale"].float()
    if not bool(torch.isfinite(scale).all()):
        raise DscError(f"{name}: NaN or infinite scales", _AGAIN)
    if "weight" in parts:  # int-quantized
        zero_point = torch.full(scale.shape, 128, dtype=torch.uint8, device=scale.device)
        return Quantized(parts["weight"].view(torch.uint8) ^ 128, scale, zero_point, 8, symmetric=True)
    rows, columns = (int(n) for n in parts["weight_shape"])
    num_bits = bits_of(name, parts["weight_packed"].shape[1], columns)
    stored = parts.get("weight_zero_point")
    if stored is None:
        zero_point = torch.full(scale.shape, 1 << (num_bits - 1), dtype=torch.uint8, device=scale.device)
    else:
        zero_point = unpack_rows(stored.T.contiguous(), num_bits, rows).T.contiguous()
    codes = unpack_rows(parts["weight_packed"], num_bits, columns)
    return Quantized(codes, scale, zero_point, num_bits, symmetric=stored is None)


def bits_of(name: str, words: int, columns: int) -> int:
    """Infer the bits of a code from the words in a row. Below 32 columns it may be ambiguous: 4 is preferred."""
    for num_bits in (4, 8, 3, 2, 5, 6, 7, 1):
        if -(-columns * num_bits // _WORD) == words:
            return num_bits
    raise DscError(f"{name}: {words} words a row do not hold {columns} columns at 1 to 8 bits", _AGAIN)


def stored_bits(info: TensorInfo) -> int:
    """Return the bits of a code of a packed weight, from its header."""
    codes = info.parts.get("weight_packed")
    return 8 if codes is None else bits_of(info.name, codes.shape[1], info.shape[1])


def logical_shape(name: str, parts: Mapping[str, Location]) -> tuple[int, int]:
    """(rows, columns) from `weight_shape`, after checking every part against it. Reads those 16 bytes only."""
    place = parts.get("weight_shape")
    if place is None or place.dtype != torch.int64 or place.shape != (2,):
        raise DscError(f"{name}: weight_packed without a weight_shape of two integers", _AGAIN)
    rows, columns = _two_numbers(place)
    codes, scale, zero_point = parts["weight_packed"], parts["weight_scale"], parts.get("weight_zero_point")
    if codes.dtype != torch.int32 or codes.shape[0] != rows or columns <= 0:
        raise DscError(
            f"{name}: weight_packed {codes.dtype} {list(codes.shape)} is not [{rows}, {columns}] packed", _AGAIN
        )
    num_bits = bits_of(name, codes.shape[1], columns)
    fits = len(scale.shape) == 2 and scale.shape[0] == rows and scale.shape[1] > 0 and columns % scale.shape[1] == 0
    if not fits or scale.dtype not in SCALE_TYPES:
        raise DscError(
            f"{name}: weight_scale {scale.dtype} {list(scale.shape)} does not fit [{rows}, {columns}]", _AGAIN
        )
    if zero_point is not None:
        expected = (-(-rows * num_bits // _WORD), scale.shape[1])
        if zero_point.dtype != torch.int32 or zero_point.shape != expected:
            found = f"{zero_point.dtype} {list(zero_point.shape)}"
            raise DscError(f"{name}: weight_zero_point {found} is not torch.int32 {list(expected)}", _AGAIN)
    return rows, columns


def _exact(scale: Tensor, dtype: torch.dtype) -> Tensor:
    stored = scale.to(dtype)
    if not torch.equal(stored.float(), scale.float()):
        raise ValueError(f"scales are not exact in {dtype}: the codes were made for other values")
    return stored


def _two_numbers(place: Location) -> tuple[int, int]:
    with open(place.file, "rb") as file:
        raw = os.pread(file.fileno(), 16, place.offset)
    return int.from_bytes(raw[:8], "little", signed=True), int.from_bytes(raw[8:], "little", signed=True)


def _pack_bytes(codes: Tensor, num_bits: int) -> Tensor:
    """Codes that never straddle a byte: (rows, columns), columns a multiple of 32 -> int32 words."""
    per_byte = 8 // num_bits
    lanes = codes.view(codes.shape[0], -1, per_byte)
    out = lanes[..., 0].clone()
    for i in range(1, per_byte):
        out |= lanes[..., i] << (i * num_bits)
    return out.view(torch.int32)


def _unpack_bytes(words: Tensor, num_bits: int) -> Tensor:
    raw = words.reshape(-1).view(torch.uint8)  # flat first: a transposed row counts as contiguous, with odd strides
    mask = (1 << num_bits) - 1
    lanes = [raw >> (i * num_bits) & mask for i in range(8 // num_bits)]
    return torch.stack(lanes, dim=-1).view(words.shape[0], -1)

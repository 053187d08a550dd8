"""Single rows of a matrix that is too large for memory, read from their places in the file and decoded.

An Engram table has 400 million rows, of which a text addresses 24 a token: each distinct row is read once, neighbours
together. Plain rows, FP8 with scales that belong to one row, and packed codes of 4 or 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.checkpoint.files import disk_errors, fill, open_regular
from deepseek_compress.checkpoint.formats import fp8, packed
from deepseek_compress.checkpoint.header import Location, TensorInfo, check_same
from deepseek_compress.errors import DscError

WORD = 32  # bits


def read_rows(info: TensorInfo, places: Tensor, config: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Return the rows `places`, int64 (n,), of the matrix `info`: (n, columns) in `dtype`."""
    wanted, back = torch.unique(places.cpu(), return_inverse=True)
    if len(wanted) and (wanted[0] < 0 or wanted[-1] >= info.shape[0]):
        raise DscError(f"{info.name}: row {int(wanted[-1])} of {info.shape[0]}", "config.json is of another checkpoint")
    return _decoded(info, wanted, config, dtype)[back]


def _decoded(info: TensorInfo, rows: Tensor, config: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """Different rows in rising order."""
    if info.encoding in ("plain", "transformed"):
        (part,) = info.parts.values()
        return _gathered(part, rows).to(dtype)
    if info.encoding == "fp8_block" and fp8.block_of(info.name, config)[0] == 1:
        block = fp8.block_of(info.name, config)
        scale = next(part for suffix, part in info.parts.items() if suffix != "weight")
        codes, scales = _gathered(info.parts["weight"], rows), _gathered(scale, rows)
        factors = fp8.finite_scale(scales, info.name).repeat_interleave(block[1], 1)[:, : codes.shape[1]]
        return (codes.float() * factors).to(dtype)
    bits = packed.stored_bits(info) if info.encoding == "packed" and "weight_packed" in info.parts else 0
    if bits not in (4, 8):
        raise DscError(f"{info.name}: rows of {info.encoding} are not read one by one", "store it in FP8 or 4 bits")
    return _unpacked(info, rows, bits, dtype)


def _unpacked(info: TensorInfo, rows: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    codes = packed.unpack_rows(_gathered(info.parts["weight_packed"], rows), bits, info.shape[1])
    scale = _gathered(info.parts["weight_scale"], rows).float()
    zero_point = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.int32)
    if "weight_zero_point" in info.parts:  # packed down the rows
        lanes = WORD // bits
        words, back = torch.unique_consecutive(rows // lanes, return_inverse=True)
        found = _gathered(info.parts["weight_zero_point"], words)[back]
        zero_point = found >> (rows % lanes * bits).int()[:, None] & (1 << bits) - 1
    values = codes.view(len(rows), scale.shape[1], -1).float() - zero_point.float().unsqueeze(-1)
    return (values * scale.unsqueeze(-1)).flatten(1).to(dtype)


def _gathered(place: Location, rows: Tensor) -> Tensor:
    """Rows, in rising order, of a stored matrix in its own type."""
    width = place.bytes // place.shape[0]
    buffer = torch.empty(len(rows) * width, dtype=torch.uint8)
    view, done = buffer.numpy().data, 0
    with disk_errors(place.file), open_regular(place.file) as file:
        check_same(place, file.fileno())
        for first, count in runs(rows.tolist()):
            part = view[done : done + count * width]
            fill(file.fileno(), part, place.offset + first * width, str(place.file))
            done += len(part)
    return buffer.view(place.dtype).view(len(rows), *place.shape[1:])


def runs(rows: list[int]) -> Iterator[tuple[int, int]]:
    """Rising numbers as (first, how many follow each other)."""
    start = 0
    for place in range(1, len(rows) + 1):
        if place == len(rows) or rows[place] != rows[place - 1] + 1:
            yield rows[start], place - start
            start = place

"""FP8 E4M3 with one scale for each block: how DeepSeek publishes V3, R1, V3.1, V3.2 and most of V4 and V4.1.

    weight[i, j] = float(code[i, j]) * scale[i // 128, j // 128]

Blocks are of 128 x 128, in V4.1 of 32 x 32: the config says it. Engram tables (V4.1) have a scale for 32 columns of a
row.

`weight_scale_inv` is the multiplier in spite of its name (DeepSeek-V3, README_WEIGHTS.md; inference/fp8_cast_bf16.py).
Scales are float32, or powers of two where the config says `scale_fmt: ue8m0` (V3.1, V3.2 as float32, V4 as E8M0).
A ragged last block has fewer rows or columns and a scale of its own.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.errors import DscError

E4M3_MAX = 448.0
DEFAULT_BLOCK = (128, 128)
ROW_TABLE = re.compile(r"(^|\.)engram\.embed\.weight$")
ROW_BLOCK = (1, 32)  # of these tables, whose rows are looked up one by one, in every published checkpoint


def block_size(config: dict[str, Any]) -> tuple[int, int]:
    """(rows, columns) of a block, from `quantization_config.weight_block_size`."""
    block = (config.get("quantization_config") or {}).get("weight_block_size") or DEFAULT_BLOCK
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        raise DscError(f"config.json: weight_block_size {block!r} is not two sizes", "write it as [128, 128]")
    return block[0], block[1]


def block_of(name: str, config: dict[str, Any]) -> tuple[int, int]:
    """(rows, columns) of a block of the weight `name`: as the config says; of an Engram table, a row by 32 columns."""
    return ROW_BLOCK if ROW_TABLE.search(name) else block_size(config)


def uses_power_of_two(config: dict[str, Any]) -> bool:
    """Whether scales are powers of two: the config says so, the model's name does not."""
    return (config.get("quantization_config") or {}).get("scale_fmt") == "ue8m0"


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int]:
    """(block rows, block columns) of a weight of (rows, columns)."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def decode_fp8_block(
    codes: Tensor,  # float8_e4m3fn (rows, columns)
    scale: Tensor,  # float32, bfloat16 or float8_e8m0fnu (block rows, block columns)
    block: tuple[int, int] = DEFAULT_BLOCK,
    dtype: torch.dtype = torch.float32,
    name: str = "weight",
) -> Tensor:
    """(rows, columns) in `dtype`: multiplied in float32, rounded once. `DscError` for a scale that is NaN."""
    factors = finite_scale(scale, name)
    rows, columns = codes.shape
    out = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    spread = factors.repeat_interleave(block[1], dim=1)[:, :columns]  # (block rows, columns)
    for i in range(factors.shape[0]):  # a band of rows at a time keeps the float32 copy small
        band = slice(i * block[0], (i + 1) * block[0])
        out[band] = (codes[band].float() * spread[i]).to(dtype)
    return out


def encode_fp8_block(
    weight: Tensor,  # float (rows, columns)
    block: tuple[int, int] = DEFAULT_BLOCK,
    power_of_two: bool = False,
) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn (rows, columns) and float32 scales (block rows, block columns).

    A scale is the block's largest magnitude / 448, rounded up to a power of two where asked, and 1 for a block of
    zeros, so that no division by zero arises.
    """
    rows, columns = weight.shape
    height, width = scale_shape((rows, columns), block)
    scale = torch.empty(height, width, dtype=torch.float32)
    codes = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    for i in range(height):
        band = slice(i * block[0], (i + 1) * block[0])
        values = weight[band].float()
        padded = torch.nn.functional.pad(values.abs().amax(dim=0), (0, width * block[1] - columns))
        absmax = padded.view(width, block[1]).amax(dim=1)
        row = torch.where(absmax > 0, absmax / E4M3_MAX, torch.ones(()))
        scale[i] = torch.exp2(torch.ceil(torch.log2(row))) if power_of_two else row
        scaled = values / scale[i].repeat_interleave(block[1])[:columns]
        codes[band] = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return codes, scale


def finite_scale(scale: Tensor, name: str) -> Tensor:
    """Return the scale as float32; `DscError` naming the weight where one is NaN, infinite or negative."""
    factors = scale.float()
    bad = int((~torch.isfinite(factors) | (factors < 0)).sum())
    if bad:
        raise DscError(
            f"{name}: {bad} of {factors.numel()} scales are NaN, infinite or negative", "download the file again"
        )
    return factors

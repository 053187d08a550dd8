"""Packed outputs of the tiny models, made with a slow round-to-nearest of our own."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.numerics.types import Quantized

LINEAR = re.compile(r"(_proj|_proj_with_mqa)\.weight$")

Scheme = dict[str, Any]
Pack = Callable[..., Path]


def round_to_nearest(weight: Tensor, group_size: int, num_bits: int = 4, symmetric: bool = False) -> Quantized:
    """Group by group: the grid spans the group and 0; scales are rounded to BF16 first."""
    rows, columns = weight.shape
    top = 2**num_bits - 1
    groups = weight.float().view(rows, -1, group_size)
    if symmetric:
        scale = groups.abs().amax(-1) / (top / 2)
    else:
        scale = (groups.amax(-1).clamp(min=0) - groups.amin(-1).clamp(max=0)) / top
    scale = torch.where(scale > 0, scale, torch.ones(())).bfloat16().float()
    if symmetric:
        zero = torch.full_like(scale, 2 ** (num_bits - 1))
    else:
        zero = (-groups.amin(-1).clamp(max=0) / scale).round().clamp(0, top)
    codes = (groups / scale.unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, top)
    return Quantized(codes.view(rows, columns).byte(), scale, zero.byte(), num_bits, symmetric)


@pytest.fixture(scope="session")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    """pack(source path, scheme(name) -> knobs or None, **writer options) -> path of the packed output."""

    def _pack(source: Path, scheme: Callable[[str], Scheme | None] | None = None, **options: Any) -> Path:
        checkpoint = open_checkpoint(source)
        out = tmp_path_factory.mktemp("packed") / "out"
        with CheckpointWriter(out, checkpoint, **options) as writer:
            for name in checkpoint.header.tensors:
                knobs = (scheme(name) if scheme else {"group_size": 64}) if LINEAR.search(name) else None
                if knobs is None:
                    writer.copy(name, decode=True)
                else:
                    writer.add(name, round_to_nearest(checkpoint.read(name), **knobs))
            writer.finish({}, {"schema": 1, "stage": "test"}, [])
        return out

    return _pack

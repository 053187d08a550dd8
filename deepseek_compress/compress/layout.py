"""Predict the output's tensor layout from shapes: tensors that stay, and weights on few bits."""

from __future__ import annotations

import dataclasses

import torch

from deepseek_compress.checkpoint.formats import packed as format_
from deepseek_compress.checkpoint.header import Location, TensorInfo, module_of
from deepseek_compress.numerics.types import WeightQuantizer


def stored16(info: TensorInfo) -> TensorInfo:
    """Return the tensor `info` as it is written where it does not change."""
    if info.encoding in ("plain", "mxfp4"):
        return info
    kind = info.dtype if info.encoding == "transformed" else torch.bfloat16
    parts = {module_of(info.name)[1]: (kind, info.shape)}
    return dataclasses.replace(info, encoding="plain", dtype=kind, parts=_located(info, parts))


def packed(info: TensorInfo, weights: WeightQuantizer) -> TensorInfo:
    """Return the weight `info` as `weights`, with their group size, would store it."""
    parts = format_.shapes_of(info.shape, weights.num_bits, weights.group_size, weights.symmetric)
    return dataclasses.replace(info, encoding="packed", dtype=torch.int32, parts=_located(info, parts))


def _located(info: TensorInfo, parts: format_.Shapes) -> dict[str, Location]:
    """Sizes, types and shapes are those of `parts`; the file is the source's, for want of another."""
    file = next(iter(info.parts.values())).file
    return {key: Location(file, 0, kind.itemsize * _count(shape), kind, shape) for key, (kind, shape) in parts.items()}


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()

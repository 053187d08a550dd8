"""What a compression would write and need, from shapes alone."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import torch

from deepseek_compress.blocks.calibrated import BATCH_TOKENS
from deepseek_compress.blocks.job import by_input
from deepseek_compress.blocks.selection import Selection
from deepseek_compress.checkpoint.header import Header, Location, TensorInfo
from deepseek_compress.models import Family, Linear, ModelConfig, Role
from deepseek_compress.numerics.types import WeightQuantizer

COPIES = 5  # matrices of the size of a Hessian that factoring it holds at once: measured with GPTQ


class Expected(NamedTuple):
    """What a run would write and need."""

    header: Header  # of the output
    changed: int  # linears
    bytes: int  # on disk
    memory: int  # bytes at the peak, libraries not counted
    operations: float


def expect(
    family: Family, cfg: ModelConfig, header: Header, selection: Selection, weights: WeightQuantizer | None, tokens: int
) -> Expected:
    """`tokens` of calibration text; 0 when no block is run."""
    tensors = {name: _stored16(info) for name, info in header.tensors.items()}
    changed, memory, operations = 0, 0, 0.0
    for layer in range(cfg.num_hidden_layers):
        linears = family.linears(cfg, layer)
        wanted = [linear for linear in linears if selection.wants(family, layer, linear)]
        for linear in wanted:
            name = f"{family.prefix(layer)}.{linear.name}.weight"
            if weights is not None:
                tensors[name] = _packed(tensors[name], weights, selection.group_size)
            changed += 1
        memory = max(memory, _memory(cfg, linears, tokens))
        operations += _operations(cfg, linears, wanted, tokens)
    out = dataclasses.replace(header, tensors=tensors)
    return Expected(out, changed, out.bytes, memory, operations)


def _stored16(info: TensorInfo) -> TensorInfo:
    if info.encoding in ("plain", "mxfp4"):
        return info
    shape, size = info.shape, 2 * info.elements
    place = Location(next(iter(info.parts.values())).file, 0, size, torch.bfloat16, shape)
    return dataclasses.replace(info, encoding="plain", dtype=torch.bfloat16, parts={"weight": place})


def _packed(info: TensorInfo, weights: WeightQuantizer, group_size: int | None) -> TensorInfo:
    rows, columns = info.shape
    groups = columns // group_size if group_size else 1
    file = next(iter(info.parts.values())).file
    words = rows * -(-columns * weights.num_bits // 32)
    sizes = {"weight_packed": (words, torch.int32), "weight_scale": (rows * groups, torch.bfloat16)}
    sizes["weight_shape"] = (2, torch.int64)
    if not weights.symmetric:
        sizes["weight_zero_point"] = (-(-rows * weights.num_bits // 32) * groups, torch.int32)
    parts = {key: Location(file, 0, n * kind.itemsize, kind, (n,)) for key, (n, kind) in sizes.items()}
    return dataclasses.replace(info, encoding="packed", dtype=torch.int32, parts=parts)


def _memory(cfg: ModelConfig, linears: list[Linear], tokens: int) -> int:
    widest = max((linear.columns for linear in linears), default=0)
    largest = max((linear.rows * linear.columns for linear in linears), default=0)
    if not tokens:
        return 4 * 4 * largest
    attention = sum(linear.rows * linear.columns for linear in linears if linear.role is Role.ATTENTION)
    batch = BATCH_TOKENS * (
        sum(linear.rows for linear in linears if linear.role is Role.ATTENTION) + 8 * cfg.hidden_size
    )
    return 4 * (max(attention, 3 * largest) + COPIES * widest * widest + batch)


def _operations(cfg: ModelConfig, linears: list[Linear], wanted: list[Linear], tokens: int) -> float:
    """Hessians 2nk^2, their factors 2k^3/3, solves 2mk^2, and the block run about three times."""
    if not tokens:
        return 20.0 * sum(linear.rows * linear.columns for linear in wanted)
    total = 0.0
    for linear in linears:
        total += 3 * 2 * _share(cfg, linear, tokens) * linear.rows * linear.columns
    for group in by_input(wanted):
        k = float(group[0].columns)
        total += 2 * _share(cfg, group[0], tokens) * k * k + 2 * k**3 / 3 + sum(2 * x.rows * k * k for x in group)
    return total


def _share(cfg: ModelConfig, linear: Linear, tokens: int) -> float:
    routed = linear.role is Role.EXPERT and cfg.moe is not None
    return tokens * cfg.moe.top_k / cfg.moe.experts if routed and cfg.moe else float(tokens)

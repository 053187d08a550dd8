"""2:4 sparsity: of each four neighbouring weights of a row, exactly two are zero."""

from __future__ import annotations

import torch
from torch import Tensor

from deepseek_compress.errors import DscError


def keep_two(score: Tensor) -> Tensor:
    """Return true for the two largest of four: (..., 4, rows) -> bool (..., 4, rows). Ties go to the earlier column."""
    kept = []
    for i in range(4):
        beaten = torch.zeros_like(score[..., 0, :], dtype=torch.int8)
        for k in range(4):
            if k < i:
                beaten += score[..., k, :] >= score[..., i, :]
            elif k > i:
                beaten += score[..., k, :] > score[..., i, :]
        kept.append(beaten < 2)
    return torch.stack(kept, dim=-2)


def check(columns: int) -> None:
    """Raise `DscError` when rows of `columns` weights do not divide into fours."""
    if columns % 4:
        raise DscError(f"{columns} columns do not divide into groups of four", "leave this linear dense")


def holds(weight: Tensor) -> bool:
    """Whether every four neighbouring weights of `weight` (rows, columns) have at least two exact zeros."""
    if weight.shape[1] % 4:
        return False
    first = weight[:1]  # nearly always enough to see that it does not
    return all(bool(((part.reshape(len(part), -1, 4) == 0).sum(-1) >= 2).all()) for part in (first, weight))

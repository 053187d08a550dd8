"""Train few numbers: the weights stay, and what is learned is of low rank (LoRA, Hu et al. 2021, arXiv 2106.09685).

    W' = W + (alpha / r) B A        A (r, columns) drawn at the start, B (rows, r) zero: the student begins as it was

A model here is a table of tensors and not a tree of modules, so peft has nothing to attach to. W' is formed for each
part of a step; moments, best weights and gradients are kept of A and B alone. Afterwards W' is what is stored, rounded
once; zeros of a 2:4 mask stay zero, since the mask covers B A too.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from deepseek_compress.errors import DscError

DOWN, UP = "lora down of ", "lora up of "  # before a tensor's name: A and B


class Lora(BaseModel, frozen=True, extra="forbid"):
    """Which linears learn, and how much they may."""

    rank: int = Field(16, gt=0)  # r; no more than a matrix has rows or columns
    alpha: float = Field(32.0, gt=0)
    modules: tuple[str, ...] = ("*",)  # shell patterns of linears of blocks, with ".weight" or without

    def chosen(self, linears: Sequence[str]) -> list[str]:
        """Return the tensors among `linears` that learn. Raises `DscError` where there is none."""
        found = [
            name
            for name in linears
            if any(fnmatch.fnmatchcase(name.removesuffix(".weight"), p.removesuffix(".weight")) for p in self.modules)
        ]
        if not found:
            raise DscError(
                f"distill.lora.modules: {', '.join(self.modules)} match no linear of a block",
                f"name one, for instance {linears[0].removesuffix('.weight')}" if linears else "leave lora out",
            )
        return found

    def over(self, weights: Mapping[str, Tensor], linears: Sequence[str], masks: Mapping[str, Tensor]) -> LowRank:
        """Return the changes of the chosen `linears`."""
        return LowRank(self, weights, self.chosen(linears), masks)

    def parameters(self, rows: int, columns: int) -> int:
        """Count the numbers that a matrix learns."""
        return min(self.rank, rows, columns) * (rows + columns)


class LowRank:
    """The linears of a student as a training sees them."""

    def __init__(
        self, lora: Lora, weights: Mapping[str, Tensor], names: Sequence[str], masks: Mapping[str, Tensor]
    ) -> None:
        self.lora, self.masks = lora, masks
        self.shapes = {name: (weights[name].shape[0], weights[name].shape[1]) for name in names}

    def leaves(self, seed: int) -> dict[str, Tensor]:
        """Return what is learned, float32: A drawn evenly within 1 / sqrt(columns), B zero."""
        generator, found = torch.Generator().manual_seed(seed), dict[str, Tensor]()
        for name, (rows, columns) in self.shapes.items():
            rank = min(self.lora.rank, rows, columns)
            drawn = torch.rand(rank, columns, generator=generator)
            found[DOWN + name] = (2 * drawn - 1) / math.sqrt(columns)
            found[UP + name] = torch.zeros(rows, rank)
        return found

    def present(self, weights: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weights` as the model computes with them, with the gradients of what is learned."""
        return {**weights, **{name: self._whole(name, weights[name], learned) for name in self.shapes}}

    def _whole(self, name: str, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        down, up = learned[DOWN + name], learned[UP + name]
        change = (self.lora.alpha / len(down)) * (up @ down)
        if name in self.masks:
            change = change * self.masks[name]
        return weight + change.to(weight.dtype)

    @property
    def numbers(self) -> int:
        """Count of what is learned."""
        return sum(self.lora.parameters(*shape) for shape in self.shapes.values())

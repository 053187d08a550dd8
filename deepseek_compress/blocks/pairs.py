"""Two models side by side: what the compressed one computes, and next to it what the original would have.

Methods that need `Statistics.drift` see every sample twice, one after the other: first as the compressed model computes
it, then as the original does. One forward over both runs each half through its own weights, so their inputs to a linear
meet where they are summed. Experts get whatever tokens the router of either model sends them: there, rows of both stand
side by side but do not match, and no drift is taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_compress.models.weights import Weights


class Split(NamedTuple):
    """Which rows of a batch are the original model's."""

    original: Tensor  # bool, one for each row of a batch's first dimension
    paired: bool  # rows alternate: compressed, original, compressed, ...
    stream: Tensor | None = None  # (n, length, hidden): what the output of the linear is added to, both halves


def pairs(samples: int) -> Split:
    """The split of a batch of `samples` alternating ones."""
    return Split(torch.arange(samples) % 2 == 1, True)


def rows(original: Tensor, x: Tensor) -> Tensor:
    """`original` for each entry of the first dimension of `x`, into which a batch may have been flattened."""
    return original.repeat_interleave(len(x) // len(original)) if len(x) > len(original) else original


class PairedWeights:
    """`changed` for the compressed model's rows, `original` for the others; norms and the like are the same in both."""

    def __init__(self, changed: Weights, original: Weights, split: Split) -> None:
        self.changed = changed
        self.original = original
        self.split = split

    def __getitem__(self, name: str) -> Tensor:
        return self.changed[name]

    def __contains__(self, name: str) -> bool:
        return name in self.changed

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (n, ..., columns) -> (n, ..., rows)."""
        theirs = rows(self.split.original, x)
        ours = self.changed.linear(name, x[~theirs])
        out = ours.new_empty(len(x), *ours.shape[1:])
        out[~theirs] = ours
        out[theirs] = self.original.linear(name, x[theirs])
        return out


def only_changed(quantize: Callable[[Tensor], Tensor], split: Split) -> Callable[[Tensor], Tensor]:
    """`quantize` for the compressed model's rows; the original's inputs are not rounded."""

    def rounded(x: Tensor) -> Tensor:
        theirs = rows(split.original, x).view(-1, *[1] * (x.dim() - 1))
        return torch.where(theirs, x, quantize(x))

    return rounded

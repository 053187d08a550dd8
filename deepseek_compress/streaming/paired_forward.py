"""Two models side by side: what the compressed one computes, and next to it what the original would have.

Methods that need `Statistics.cross_covariance` see every sample twice, one after the other: first as the compressed
model computes it, then as the original does. One forward over both runs each half through its own weights, so their
inputs to a linear meet where they are summed.

A routed expert of the compressed model gets the tokens that the compressed model's router sends it, since those are the
ones it will get; next to each stands the same token as the original's stream has it, wherever the original's router
sends that, so that the target is what the original's expert makes of the original's input. The tokens that the original
routes there itself are run too, for its own stream alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from deepseek_compress.models.weights import Weights


class Split(NamedTuple):
    """Which rows of a batch's first dimension are whose, int64 each: a mask's rows would have to be waited for."""

    size: int  # rows
    ours: Tensor  # of the compressed model
    theirs: Tensor  # of the original
    partners: Tensor  # the original's that stand, in order, next to the compressed model's
    stream: Tensor | None = None  # (n, length, hidden): what the output of the linear is added to, both halves


def pairs(samples: int, device: torch.device | str = "cpu") -> Split:
    """Return the split of a batch of `samples` alternating ones."""
    ours, theirs = (torch.arange(first, samples, 2, device=device) for first in (0, 1))
    return Split(samples, ours, theirs, theirs)


def alongside(tokens: Tensor, length: int) -> tuple[Tensor, int]:
    """Return what an expert is given, for the rows `tokens` (n,) of a store that routers sent it, and how many pairs
    that is.

    First each row of the compressed model and, next to it, the same token as the original has it, `length` rows on;
    then the original's rows that stand next to none.
    """
    theirs = tokens // length % 2 == 1
    ours = tokens[~theirs]
    partners = ours + length
    rest = tokens[theirs & ~torch.isin(tokens, partners)]
    return torch.cat((torch.stack((ours, partners), 1).flatten(), rest)), len(ours)


def pairs_first(places: range, pairs: int, device: torch.device | str = "cpu") -> Split:
    """Return the split of these places of what `alongside` gives."""
    count, odd = len(places), places.start % 2
    end = min(max(0, 2 * pairs - places.start), count)
    ours, partners = (torch.arange(min(first, end), end, 2, device=device) for first in (odd, 1 - odd))
    rest = torch.arange(end, count, device=device)
    return Split(count, ours, torch.cat((partners, rest)), partners)


def rows(chosen: Tensor, split: Split, x: Tensor) -> Tensor:
    """Return the entries of the first dimension of `x`, into which a batch may have been flattened, of rows
    `chosen`."""
    each = len(x) // split.size
    return chosen if each == 1 else (chosen[:, None] * each + torch.arange(each, device=chosen.device)).flatten()


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

    def rows(self, name: str, places: Tensor) -> Tensor:
        """Return the rows `places` (n,) of a tensor: (n, columns)."""
        return self.changed.rows(name, places)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (n, ..., columns) -> (n, ..., rows). What no recipe changes is the same in both."""
        if name + ".weight" not in self.original:
            return self.changed.linear(name, x)
        mine, theirs = (rows(chosen, self.split, x) for chosen in (self.split.ours, self.split.theirs))
        ours = self.changed.linear(name, x[mine])
        out = ours.new_empty(len(x), *ours.shape[1:])
        out[mine] = ours
        out[theirs] = self.original.linear(name, x[theirs])
        return out


def only_changed(quantize: Callable[[Tensor], Tensor], split: Split) -> Callable[[Tensor], Tensor]:
    """`quantize` for the compressed model's rows; the original's inputs are not rounded."""

    def rounded(x: Tensor) -> Tensor:
        theirs = rows(split.theirs, split, x)
        return quantize(x).index_copy(0, theirs, x[theirs])

    return rounded

"""Watch what enters the MLP or the experts of each block while a model runs."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import Tensor

from deepseek_compress.models.config import ModelConfig
from deepseek_compress.models.family import Family
from deepseek_compress.models.weights import Weights

Tap = Callable[[int, Weights, Tensor], None]  # (layer, its weights, input of its MLP or experts (B, T, hidden))


def tapped(family: Family, tap: Tap) -> Family:
    """`family`, with `tap` called for what enters the MLP or the experts of each block."""
    watched = copy.copy(family)
    inner = family.ffn_input

    def ffn_input(cfg: ModelConfig, layer: int, weights: Weights, hidden: Tensor) -> Tensor:
        x = inner(cfg, layer, weights, hidden)
        tap(layer, weights, x)
        return x

    watched.ffn_input = ffn_input  # type: ignore[method-assign]
    return watched

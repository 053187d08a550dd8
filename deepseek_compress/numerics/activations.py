"""Dynamic ranges for activations: each token gets its own scale, computed from its own values while the model runs.

`round_tokens` gives the values that integer products would see ("fake quantisation"), in the type of its input:
symmetric `q = round(x / s)`, `s = max|x| / (2**(b-1) - 1)`; asymmetric over the token's range, widened to include 0.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor

_SMALLEST = 1e-30


def round_tokens(x: Tensor, num_bits: int, symmetric: bool) -> Tensor:
    """`x` (..., features) with each token (...) rounded to its own grid of 2**num_bits values; zeros stay zeros."""
    values = x.float()
    if symmetric:
        top = 2 ** (num_bits - 1) - 1
        scale = values.abs().amax(-1, keepdim=True) / top
        scale = torch.where(scale > _SMALLEST, scale, torch.ones_like(scale))
        return (values / scale).round_().mul_(scale).to(x.dtype)
    top = 2**num_bits - 1
    low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / top
    scale = torch.where(scale > _SMALLEST, scale, torch.ones_like(scale))
    zero = (low / -scale).round_()
    return (values / scale).round_().clamp_(-zero, top - zero).mul_(scale).to(x.dtype)


class Dynamic(BaseModel, frozen=True, extra="forbid"):
    """Dynamic-range activations: one scale a token, from the token itself, no calibration."""

    paper: ClassVar[str] = "Yao et al. 2022, ZeroQuant (section 4.1, token-wise), arXiv 2206.01861"
    num_bits: Literal[4, 8] = 8
    granularity: Literal["token"] = "token"
    symmetric: bool = Field(True)
    attention: bool = False  # the products of attention in 8 bits too, around a 16-bit softmax

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (..., features) as the linear sees it."""
        return round_tokens(x, self.num_bits, self.symmetric)

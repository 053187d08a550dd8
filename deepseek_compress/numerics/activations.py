"""Activations in few bits: the values that integer products would see ("fake quantisation"), in the type of the input.

Dynamic: each token gets its own scale, from its own values while the model runs. Symmetric `q = round(x / s)`,
`s = max|x| / (2**(b-1) - 1)`; asymmetric over the token's range, widened to include 0.

Static: one grid for all that a linear will ever see, `q = clip(round(x / s + z), -2**(b-1), 2**(b-1) - 1)` and
`x ~ (q - z) s`, as compressed-tensors computes it; `ranges` estimates how far it reaches. s is rounded to BF16, in
which checkpoints store it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, BeforeValidator, PlainSerializer
from torch import Tensor

from deepseek_compress.numerics.ranges import ESTIMATORS, Estimator, MinMax, Seen, named
from deepseek_compress.registry import pick

SMALLEST = 1e-30  # a scale: a token below it keeps its zeros


def round_tokens(x: Tensor, num_bits: int, symmetric: bool) -> Tensor:
    """`x` (..., features) with each token (...) rounded to its own grid of 2**num_bits values; zeros stay zeros."""
    values = x.float()
    if symmetric:
        top = 2 ** (num_bits - 1) - 1
        scale = values.abs().amax(-1, keepdim=True) / top
        scale = torch.where(scale > SMALLEST, scale, torch.ones_like(scale))
        return (values / scale).round_().mul_(scale).to(x.dtype)
    top = 2**num_bits - 1
    low, high = values.amin(-1, keepdim=True).clamp(max=0), values.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / top
    scale = torch.where(scale > SMALLEST, scale, torch.ones_like(scale))
    zero = (low / -scale).round_()
    return (values / scale).round_().clamp_(-zero, top - zero).mul_(scale).to(x.dtype)


@dataclass(frozen=True)
class InputGrid:
    """The grid of one linear's input."""

    scale: float  # exact in BF16
    zero_point: int = 0  # -2**(num_bits - 1) to 2**(num_bits - 1) - 1
    num_bits: int = 8

    @classmethod
    def over(cls, low: float, high: float, num_bits: int, symmetric: bool) -> InputGrid:
        """Return that reaches from `low` to `high`, and to 0."""
        low, high, top = min(low, 0.0), max(high, 0.0), 1 << (num_bits - 1)
        scale = max(-low, high) / (top - 1) if symmetric else (high - low) / (2 * top - 1)
        scale = float(torch.tensor(scale if scale > SMALLEST else 1.0).bfloat16())
        zero = 0 if symmetric else max(-top, min(top - 1, round(-top - low / scale)))
        return cls(scale, zero, num_bits)

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (..., features) as the linear sees it."""
        top, zero = 1 << (self.num_bits - 1), self.zero_point
        codes = (x.float() / self.scale).add_(zero).round_().clamp_(-top, top - 1)
        return codes.sub_(zero).mul_(self.scale).to(x.dtype)


class Activations(BaseModel, frozen=True, extra="forbid"):
    """Rounding of linears' inputs. Fields are the knobs of a recipe."""

    paper: ClassVar[str] = ""
    num_bits: Literal[4, 8] = 8
    symmetric: bool = True


class Dynamic(Activations, frozen=True):
    """Dynamic-range activations: one scale a token, from the token itself, no calibration."""

    paper: ClassVar[str] = "Yao et al. 2022, ZeroQuant (section 4.1, token-wise), arXiv 2206.01861"
    granularity: Literal["token"] = "token"
    attention: bool = False  # the products of attention in 8 bits too, around a 16-bit softmax

    def __call__(self, x: Tensor) -> Tensor:
        """`x` (..., features) as the linear sees it."""
        return round_tokens(x, self.num_bits, self.symmetric)


def _picked(value: Any) -> Estimator:
    return value if isinstance(value, Estimator) else pick(ESTIMATORS, value, "estimator")


class Static(Activations, frozen=True):
    """Static activations: one grid for each linear's input, found by an estimator on calibration text."""

    paper: ClassVar[str] = "Wu et al. 2020, Integer quantization for inference (section 5.2), arXiv 2004.09602"
    num_bits: Literal[8] = 8
    granularity: Literal["tensor"] = "tensor"
    estimator: Annotated[Estimator, BeforeValidator(_picked), PlainSerializer(named)] = MinMax()

    def ends(self, seen: Seen) -> tuple[float, float]:
        """Return the lower and upper end of an input's grid."""
        if not seen.largest > 0:  # nothing but zeros
            return 0.0, 0.0
        return seen.clipped(self.estimator.threshold(seen, self.num_bits, self.symmetric), self.symmetric)

    def grid(self, low: float, high: float) -> InputGrid:
        """Between these ends."""
        return InputGrid.over(low, high, self.num_bits, self.symmetric)

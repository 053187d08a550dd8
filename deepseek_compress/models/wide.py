"""The type that norms, softmax and scores are computed in: float32, or float64 where their input is that.

A model in float64 is what a model in float32 is compared with.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wide_type(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """`x` in that type."""
    return x.to(wide_type(x))

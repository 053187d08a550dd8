"""Orthogonal matrices that spread what stands out over all channels (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456).

For n = 2^k m with m odd,   R = diag(signs) (H / sqrt(2^k)) (x) Q,   H the Hadamard matrix of order 2^k by Sylvester's
construction, Q an orthogonal matrix of order m (from the QR factorisation of a random one; 1 for m = 1), signs random:
every entry has a size near 1 / sqrt(n), and x R takes k additions and m products a value. The published code has tables
of Hadamard matrices for some orders instead of Q; this serves every n.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

ROWS = 1024


class Hadamard(BaseModel, frozen=True, extra="forbid"):
    """Residual stream and values rotated by random Hadamard matrices that are folded into the weights."""

    paper: ClassVar[str] = "Ashkboos et al. 2024, QuaRot, arXiv 2404.00456; SpinQuant's R1 and R2, arXiv 2405.16406"
    seed: int = Field(0, ge=0)


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix of order `size`; the same seed gives the same one."""

    size: int
    seed: int = 0

    def __call__(self, x: Tensor) -> Tensor:
        """float32 (..., size) -> x R."""
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        flat = out.view(-1, self.size)
        for start in range(0, len(flat), ROWS):  # few rows at a time stay in the cache
            flat[start : start + ROWS] = self._rotated(x.reshape(-1, self.size)[start : start + ROWS])
        return out

    def _rotated(self, x: Tensor) -> Tensor:
        odd = self.size // (power := self.size & -self.size)
        generator = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(2, (self.size,), generator=generator) * 2 - 1
        spread = (x * signs).reshape(*x.shape[:-1], power, odd)
        if odd > 1:
            random = torch.randn(odd, odd, dtype=torch.float64, generator=generator)
            spread = spread @ torch.linalg.qr(random).Q.to(x.dtype)
        return _hadamard(spread.transpose(-1, -2)).transpose(-1, -2).reshape(x.shape)

    def rows(self, weight: Tensor) -> Tensor:
        """R^T W for W (size, columns): what a linear gives, times R. A bias (size,) is b R."""
        return self(weight.mT.contiguous()).mT.contiguous() if weight.dim() > 1 else self(weight)


def _hadamard(x: Tensor) -> Tensor:
    """x (..., 2^k) times the Hadamard matrix, scaled to be orthogonal: sums and differences of halves, k times."""
    size, shape = x.shape[-1], x.shape
    out = x.reshape(-1, size)
    half = 1
    while half < size:
        pairs = out.view(len(out), -1, 2, half)
        out = torch.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), dim=2).view(-1, size)
        half *= 2
    return (out * (1 / math.sqrt(size))).view(shape)

"""Slow, obvious references in float64, and inputs on which they mean something."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def correlated(rows: int, columns: int, tokens: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight (rows, columns) and the Hessian of inputs that are correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    tokens = tokens or 4 * columns
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + 0.5 * torch.eye(columns)
    sizes = torch.exp(torch.randn(columns, generator=generator))
    x = torch.randn(tokens, columns, generator=generator) @ mix * sizes
    weight = torch.randn(rows, columns, generator=generator) * (1 + torch.rand(rows, 1, generator=generator))
    return weight, x.t() @ x


def obs(
    weight: Tensor,
    hessian: Tensor,
    choose: Callable[[int, Tensor], Tensor],
    begin: Callable[[int, Tensor, Callable[[int], Tensor]], None] | None = None,
) -> Tensor:
    """GPTQ as its section 3 writes it: fix a column, correct the rest by the inverse Hessian of what remains.

    `weight` (rows, columns) in solving order. `begin(j, updated weight, cost)` is called before every column; `cost(k)`
    is 1 / [H_k^-1]_00 with H_k the Hessian of columns k and later. The inverse is taken anew for every column.
    """
    w, h = weight.double().clone(), hessian.double()

    def inverse(k: int) -> Tensor:
        return torch.linalg.inv(h[k:, k:])

    for j in range(w.shape[1]):
        if begin is not None:
            begin(j, w, lambda k: 1 / inverse(k)[0, 0])
        rest = inverse(j)
        value = choose(j, w[:, j])
        error = (w[:, j] - value) / rest[0, 0]
        w[:, j:] -= error[:, None] * rest[0][None, :]
        w[:, j] = value
    return w

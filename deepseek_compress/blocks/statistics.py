"""What the input of a linear looks like over the calibration text, summed batch by batch in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from deepseek_compress.models.weights import ObservingWeights, Weights
from deepseek_compress.numerics.types import Statistics

ROWS = 2048  # tokens that are multiplied at a time; fixed, since sums in another order have other bits


class Accumulator:
    """Sums the fields of `Statistics` that a solver needs, over inputs (..., columns)."""

    def __init__(self, needs: Iterable[str]) -> None:
        self.needs = frozenset(needs)
        self.tokens = 0
        self._hessian: Tensor | None = None
        self._absmax: Tensor | None = None
        self._abssum: Tensor | None = None

    def add(self, x: Tensor) -> None:
        """Take in x (..., columns)."""
        for rows in torch.split(x.reshape(-1, x.shape[-1]).float(), ROWS):
            self._rows(rows)

    def _rows(self, x: Tensor) -> None:
        self.tokens += len(x)
        columns = x.shape[1]
        if "hessian" in self.needs:
            self._hessian = x.new_zeros(columns, columns) if self._hessian is None else self._hessian
            self._hessian.addmm_(x.T, x)
        if "input_absmax" in self.needs:
            largest = x.abs().amax(0)
            self._absmax = largest if self._absmax is None else torch.maximum(self._absmax, largest)
        if "input_absmean" in self.needs:
            total = x.abs().sum(0)
            self._abssum = total if self._abssum is None else self._abssum + total

    def statistics(self) -> Statistics:
        """The sums so far."""
        mean = None if self._abssum is None else self._abssum / max(1, self.tokens)
        return Statistics(self.tokens, self._hessian, self._absmax, mean)


class _Seen(Exception):
    """The input was seen; the rest of the forward is not needed."""


def observe(
    forward: Callable[[Callable[[Weights], Weights], int], object],
    names: frozenset[str],
    batches: int,
    into: Accumulator,
) -> None:
    """Feed `into` with the input that the linears `names` share, over all batches.

    `forward(watch, batch)` runs over `watch(weights)` and is stopped at the first of them, so what comes after need not
    be there yet.
    """

    def look(name: str, x: Tensor) -> None:
        if name in names:
            into.add(x)
            raise _Seen

    for batch in range(batches):
        try:
            forward(lambda weights: ObservingWeights(weights, look), batch)
        except _Seen:
            continue
        raise ValueError(f"none of {sorted(names)} ran")

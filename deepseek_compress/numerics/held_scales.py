"""SmoothQuant's scales, moved only where held-back tokens gain by it.

SmoothQuant has one strength alpha for a whole model, and what it gives one layer it takes from another: where no
channel stands out, moving scales makes weights harder to round for nothing. Here alpha is chosen for each place, 0
(nothing moves) among the candidates: some rows of every weight that reads the channels are rounded by GPTQ with the
Hessian of one half of the tokens, and the other half gives the error, `tr((W - Q) H (W - Q)^T)`; then the halves change
roles. A place moves only for a gain of more than `LEAST`: below that it is noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.hessian import layer_error
from deepseek_compress.numerics.migration import Migration, SmoothQuant
from deepseek_compress.numerics.types import Statistics

LEAST = 0.03  # share of the error
ROWS = 16  # of each weight that are rounded


class HeldScales(Migration, frozen=True):
    """SmoothQuant with an alpha for each place, the one that serves held-back tokens best; often none."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "input_absmax", "half"})
    streams: ClassVar[bool] = True
    paper: ClassVar[str] = SmoothQuant.paper
    alphas: tuple[float, ...] = Field((0.25, 0.5), min_length=1)
    num_bits: int = Field(4, ge=2, le=8)  # of the rounding that is tried
    group_size: int | None = Field(None, gt=0)
    symmetric: bool = False

    def kept(self, weight: Tensor) -> Tensor:
        """Return the largest value of each column, then some rows: (1 + ROWS, columns)."""
        places = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).long()
        return torch.cat((weight.abs().amax(0, keepdim=True), weight[places]))

    def scales(self, weights: Sequence[Tensor], statistics: Statistics) -> Tensor:
        """Needs `statistics.hessian`, `input_absmax` and `half`; ones where nothing should move."""
        assert statistics.hessian is not None, "needs the Hessian"
        still = weights[0].new_ones(weights[0].shape[1])
        if statistics.half is None or statistics.half.hessian is None:
            return still
        first = statistics.half.hessian
        halves, rows = (first, statistics.hessian - first), torch.cat([weight[1:] for weight in weights])
        largest = [weight[:1] for weight in weights]
        unmoved = self._error(rows, still, *halves)
        best, lowest = still, (1 - LEAST) * unmoved
        for alpha in self.alphas:
            scales = SmoothQuant.model_validate({"alpha": alpha}).scales(largest, statistics)
            error = self._error(rows, scales, *halves)
            if error < lowest:
                best, lowest = scales, error
        return best

    def _error(self, rows: Tensor, scales: Tensor, first: Tensor, second: Tensor) -> float:
        """Of `rows` (n, columns) rounded with one half's Hessian, on the other half; both ways."""
        knobs = {"num_bits": self.num_bits, "group_size": self.group_size, "symmetric": self.symmetric}
        solver = Gptq.model_validate(knobs)
        total = 0.0
        for solving, judging in ((first, second), (second, first)):
            moved = Statistics(hessian=solving / scales[:, None] / scales[None, :])
            total += layer_error(rows, solver(rows * scales, moved).dequantize() / scales, judging)
        return total

"""YAQA (Tseng, Sun, De Sa 2025, arXiv 2505.22988): round towards the model's output, not the linear's.

What a change E = W - Q of one linear costs at the model's output is, to second order and with the Kronecker factors of
the Fisher information, `tr(G E H E^T)`: H = sum x x^T over its inputs, G the mean of g g^T over the
gradients of log p(y) by its outputs, y drawn from the model's own prediction. GPTQ is G = 1. With
`G = (I + F)^T D (I + F)` in an order of the rows as with H (see `hessian`), the best row i after the rows before it are
fixed is the rounding of

    w_i + sum_{k < i} F_ik (w_k - q_k)

by GPTQ: errors go where later blocks do not look. Left out: rows are fixed `BLOCK` at a time, and do not see one
another's errors within a block, so that a block is rounded at full speed.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from deepseek_compress.numerics import pattern
from deepseek_compress.numerics.gptaq import Gptaq
from deepseek_compress.numerics.gptq import Gptq, solving_order
from deepseek_compress.numerics.hessian import factorize
from deepseek_compress.numerics.types import Quantized, Statistics

BLOCK = 32  # rows


class Yaqa(Gptq, frozen=True):
    """GPTQ whose errors are steered to where the model's output does not notice them."""

    paper: ClassVar[str] = "Tseng et al. 2025, Model-Preserving Adaptive Rounding (YAQA), arXiv 2505.22988"
    output_damping: float = Field(0.5, ge=0)  # share of the mean of G's diagonal: few gradients tell G roughly
    output_samples: int = Field(8, ge=1)  # of the calibration text that G is taken from, the first ones

    def __call__(self, weight: Tensor, statistics: Statistics) -> Quantized:
        """`weight` float32 (rows, columns); without output Hessians this is GPTQ."""
        hessians = statistics.output_hessian
        if hessians is None:
            return super().__call__(weight, statistics)
        prepared = self.prepare(statistics)
        found: list[Quantized] = []
        for own, g in zip(weight.chunk(len(hessians)), hessians, strict=True):
            factor = factorize(g, solving_order(g, "column", None), self.output_damping)
            blocks = self._in_order(own[factor.order], factor.feedback, prepared)
            found.append(_joined(blocks, torch.argsort(factor.order)))
        return _joined(found)

    def _in_order(self, target: Tensor, feedback: Tensor, prepared: Statistics) -> list[Quantized]:
        """`target` (rows, columns) in solving order, `BLOCK` rows at a time."""
        error, found, masked = torch.zeros_like(target), [], pattern.holds(target)
        for start in range(0, len(target), BLOCK):
            rows = slice(start, min(start + BLOCK, len(target)))
            moved = torch.addmm(target[rows], feedback[rows, :start], error[:start])
            if masked:
                moved = moved.masked_fill(target[rows] == 0, 0)
            found.append(super().__call__(moved, prepared))
            error[rows] = target[rows] - found[-1].dequantize()
        return found


def _joined(parts: list[Quantized], order: Tensor | slice = slice(None)) -> Quantized:
    """`parts` below one another, their rows then in `order`."""
    codes, scale, zero_point = (torch.cat(part)[order] for part in zip(*(part[:3] for part in parts), strict=True))
    return parts[0]._replace(codes=codes, scale=scale, zero_point=zero_point)


class YaqaGptaq(Gptaq, Yaqa, frozen=True):
    """YAQA's rounding towards the original model's outputs, as GPTAQ corrects them."""

    paper: ClassVar[str] = f"{Gptaq.paper}; {Yaqa.paper}"

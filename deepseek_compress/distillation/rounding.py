"""Train what is stored: weights, scales and inputs are rounded on the way forward, gradients pass straight through.

    W_q = (clip(round(W / s) + z) - z) s        round: straight through (Bengio et al. 2013, arXiv 1308.3432)

With autograd through the rest, the scale s learns as in LSQ (Esser et al. 2020, arXiv 1902.08153): by what rounding
adds and what clipping cuts off. s = bf16(s_0 (1 + a)) and the zero point stays, so codes, scales and what the training
saw are the stored ones. W begins at the original's weight, moved into the cell of the code that the compression chose:
the student begins as the packed model, and a weight that was nearly rounded the other way is near to turning.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deepseek_compress.distillation.recovery import moved
from deepseek_compress.models.activations import InputScheme, Rounding
from deepseek_compress.numerics import pattern
from deepseek_compress.numerics.types import Quantized

CELL = 0.49  # of a scale: how far a weight may begin from the middle of its code's cell
SCALE = "scale of "  # before a tensor's name: its relative change


class Straight:
    """Packed weights of a student as a training sees them."""

    def __init__(self, packed: Mapping[str, Quantized]) -> None:
        self.packed = packed

    def starts(self, original: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Where the packed weights begin; `original`: a model's with the same names and shapes, as far as there are."""
        found = {}
        for name, packed in self.packed.items():
            weight = packed.dequantize()
            near = original.get(name)
            if near is not None and near.shape == weight.shape:
                reach = CELL * packed.scale.repeat_interleave(packed.group_size, 1)
                step = (near.float() - weight).clamp(-reach, reach)
                weight = torch.where((weight == 0) & pattern.holds(weight), weight, weight + step)
            found[name] = weight
        return found

    def scales(self) -> dict[str, Tensor]:
        """Return what is learned of each packed weight's scales: float32 (rows, groups), 0 at first."""
        return {SCALE + name: torch.zeros_like(packed.scale) for name, packed in self.packed.items()}

    def present(self, weights: Mapping[str, Tensor], learned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`weights` as the model computes with them, with their gradients."""
        return {**weights, **{name: self._rounded(name, weights[name], learned) for name in self.packed}}

    @torch.no_grad()
    def stored(self, name: str, weight: Tensor, learned: Mapping[str, Tensor]) -> Quantized:
        """Codes and scales of a trained weight: their value is what `present` gave."""
        packed = self.packed[name]
        scale = moved(packed.scale, learned[SCALE + name])
        places = self._places(packed, weight, scale).round().clamp(0, _top(packed))
        return packed._replace(codes=places.view_as(packed.codes).to(torch.uint8), scale=scale)

    def _rounded(self, name: str, weight: Tensor, learned: Mapping[str, Tensor]) -> Tensor:
        packed = self.packed[name]
        exact = packed.scale * (1 + learned[SCALE + name])
        scale = exact + (moved(packed.scale, learned[SCALE + name]) - exact).detach()
        places = self._places(packed, weight, scale)
        codes = (places + (places.round() - places).detach()).clamp(0, _top(packed))
        return ((codes - packed.zero_point.unsqueeze(-1)) * scale.unsqueeze(-1)).view_as(weight)

    def _places(self, packed: Quantized, weight: Tensor, scale: Tensor) -> Tensor:
        """(rows, groups, group size) on the line of codes, before rounding."""
        return weight.view(*scale.shape, -1) / scale.unsqueeze(-1) + packed.zero_point.unsqueeze(-1)


def _top(packed: Quantized) -> int:
    return int((1 << packed.num_bits) - 1)


def straight_inputs(scheme: InputScheme | None) -> InputScheme | None:
    """Return a scheme for inputs of linears whose rounding passes gradients; products of attention stay unrounded."""
    if scheme is None:
        return None
    quantize = None if scheme.quantize is None else _straight(scheme.quantize)
    inputs = {name: _straight(grid) for name, grid in scheme.inputs.items()}
    return scheme._replace(quantize=quantize, attention=False, inputs=inputs)  # type: ignore[arg-type]


def _straight(rounding: Rounding) -> Rounding:
    return lambda x: x + (rounding(x) - x).detach()

"""Sparsify, then quantise, the linears that share an input, and measure what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.compress.job import Group, Solved
from deepseek_compress.compress.selection import Selection
from deepseek_compress.models import Block, Linear
from deepseek_compress.numerics import side_by_side
from deepseek_compress.numerics.gptaq import Gptaq
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.magnitude import Magnitude
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Quantized, Sparsifier, Statistics, WeightQuantizer

SAMPLED = 64  # rows


@dataclass(frozen=True)
class LinearSolver:
    """`sparsity`, then `weights`; both see the same statistics. Without those, their data-free stand-ins."""

    selection: Selection
    sparsity: Sparsifier | None
    weights: WeightQuantizer | None
    min_tokens: int

    @property
    def needs(self) -> frozenset[str]:
        """Statistics that the parts need."""
        return frozenset[str]().union(*(part.needs for part in (self.sparsity, self.weights) if part is not None))

    def wants(self, block: Block, linear: Linear) -> bool:
        """Whether this linear changes; with activations alone, none does."""
        return bool(self.sparsity or self.weights) and self.selection.wants(block, linear)

    def solve(self, block: Block, group: Sequence[tuple[Linear, Tensor]], statistics: Statistics) -> list[Solved]:
        """Return new weights for linears that share an input: float32 (rows, columns) each, not modified."""
        fallback = bool(self.needs) and statistics.hessian is None and statistics.input_absmax is None
        values, sparsity = [weight for _, weight in group], self._sparsifier(fallback)
        if sparsity is not None:
            masked = sparsity.prepare(statistics)
            values = [sparsity(weight, masked) for weight in values]
            del masked  # its factor is as large as the Hessian
            if "cross_covariance" in sparsity.needs:  # made good already: a second correction would be one too many
                statistics = statistics._replace(cross_covariance=None, residual_covariance=None, half=None)
        quantizers = [self.quantizer(block, linear, fallback) for linear, _ in group]
        prepared = {its: its.prepare(statistics) for its in dict.fromkeys(quantizers) if its is not None}
        decided = [its and its.decided(weight, prepared[its]) for weight, its in zip(values, quantizers, strict=True)]
        stored = [
            weight.to(torch.bfloat16) if its is None or final is None else final(weight, prepared[its])
            for weight, its, final in zip(values, quantizers, decided, strict=True)
        ]
        methods = [
            "+".join(type(part).__name__.lower() for part in (sparsity, its) if part is not None) for its in quantizers
        ]
        facts = {"tokens": statistics.tokens, "fallback": fallback}
        return [
            Solved(new, {"method": method, **facts, **_extra(its), **measure(weight, new, statistics)})
            for (_, weight), new, method, its in zip(group, stored, methods, decided, strict=True)
        ]

    def solve_together(self, jobs: Sequence[tuple[Block, Group, Statistics]]) -> list[list[Solved]]:
        """See `job.Together`: side by side where the method can, one by one where it cannot."""
        whole = [number for number, (_, _, statistics) in enumerate(jobs) if statistics.hessian is not None]
        found = dict(zip(whole, self._side_by_side([jobs[number] for number in whole]), strict=False))
        return [found[number] if number in found else self.solve(*job) for number, job in enumerate(jobs)]

    def _side_by_side(self, jobs: Sequence[tuple[Block, Group, Statistics]]) -> list[list[Solved]]:
        """Solve inputs that have statistics; nothing where they cannot be solved together."""
        flat = [(block, *pair, statistics) for block, group, statistics in jobs for pair in group]
        weights = [weight for _, _, weight, _ in flat]
        quantizers = [self.quantizer(block, linear, fallback=False) for block, linear, _, _ in flat]
        if len(jobs) < 2 or self.sparsity is not None or not side_by_side.fits(weights, quantizers):
            return []
        gptq = quantizers[0]
        assert isinstance(gptq, Gptq)
        prepared = side_by_side.prepare(gptq, [statistics for _, _, statistics in jobs])
        own = [its for its, (_, group, _) in zip(prepared, jobs, strict=True) for _ in group]
        stored = iter(side_by_side.quantize(gptq, weights, own))
        return [
            [
                Solved(
                    new := next(stored),
                    {"method": "gptq", "tokens": its.tokens, "fallback": False, **measure(weight, new, its)},
                )
                for _, weight in group
            ]
            for _, group, its in jobs
        ]

    def quantizer(self, block: Block, linear: Linear, fallback: bool) -> WeightQuantizer | None:
        """Return the quantiser of a linear that changes; `fallback`: the one that needs no statistics."""
        if self.weights is None:
            return None
        found = self.selection.quantizer(block.prefix + linear.name, linear.columns, self.weights)
        if fallback and found.needs:
            return Rtn(num_bits=found.num_bits, group_size=found.group_size, symmetric=found.symmetric)
        return found

    def _sparsifier(self, fallback: bool) -> Sparsifier | None:
        if self.sparsity is not None and fallback and self.sparsity.needs:
            return Magnitude(pattern=self.sparsity.pattern)
        return self.sparsity


def _extra(quantizer: WeightQuantizer | None) -> dict[str, Any]:
    """Return what was decided for one linear."""
    return {"strength": quantizer.strength} if isinstance(quantizer, Gptaq) else {}


def measure(weight: Tensor, stored: Tensor | Quantized, statistics: Statistics) -> dict[str, Any]:
    """Return what the change cost: relative squared errors of the weight and, with a Hessian, of the linear's output.

    output_error = ||X (W - Q)^T||^2 / ||X W^T||^2 over the calibration tokens; None without them. Over SAMPLED rows of
    a larger weight, drawn once and for all by their number: over all rows it would cost more than finding Q.
    """
    found = torch.zeros(5, dtype=torch.float64, device=weight.device)  # read once: a GPU is waited for
    for start in range(0, len(weight), SAMPLED):  # few rows at a time stay in the cache
        chunk = slice(start, start + SAMPLED)
        loaded = _loaded(stored, chunk)
        found[0] += _squares(weight[chunk])
        found[1] += _squares(weight[chunk] - loaded)
        found[2] += loaded.numel() - loaded.count_nonzero()
    if statistics.hessian is not None:
        found[3:] = _output_squares(weight, stored, statistics.hessian)
    energy, lost, zeros, output, missed = found.tolist()
    return {
        "weight_error": lost / energy if energy > 0 else 0.0,
        "output_error": None if statistics.hessian is None else missed / output if output > 0 else 0.0,
        "zeros": zeros / weight.numel(),
        "bits": bits(stored),
        "weights": weight.numel(),
    }


def _output_squares(weight: Tensor, stored: Tensor | Quantized, hessian: Tensor) -> Tensor:
    """||X W^T||^2 and ||X (W - Q)^T||^2, float64 (2,)."""
    rows = sampled(len(weight)).to(weight.device)
    before = weight[rows]
    both = torch.cat((before, before - _loaded(stored, rows)))
    return ((both @ hessian) * both).sum(1, dtype=torch.float64).view(2, -1).sum(1)


def sampled(rows: int) -> Tensor:
    """int64: which of `rows` rows of a weight its output error is taken from."""
    if rows <= SAMPLED:
        return torch.arange(rows)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(rows))[:SAMPLED].sort().values


def _loaded(stored: Tensor | Quantized, rows: slice | Tensor) -> Tensor:
    if not isinstance(stored, Quantized):
        return stored[rows].float()
    parts = (stored.codes[rows], stored.scale[rows], stored.zero_point[rows])
    return Quantized(*parts, stored.num_bits, stored.symmetric).dequantize()


def _squares(x: Tensor) -> Tensor:
    return x.flatten().dot(x.flatten())


def bits(stored: Tensor | Quantized) -> float:
    """Bits per weight on disk, scales and zero points included."""
    if not isinstance(stored, Quantized):
        return 8.0 * stored.element_size()
    return packed_bits(stored.num_bits, stored.group_size, stored.symmetric)


def packed_bits(num_bits: int, group_size: int, symmetric: bool) -> float:
    """Bits per weight of a packed linear."""
    return num_bits + (16 + (0 if symmetric else num_bits)) / group_size

"""NVIDIA ModelOpt's calibrations (nvidia-modelopt, its own code on one linear), so that they stand in the same report.

Its integer grids are symmetric: a group has one largest magnitude, `amax`, and the values `amax / (2^(b-1) - 1)` times
`-2^(b-1) .. 2^(b-1) - 1`. `max` takes that of the weights. `awq_clip` tries 0.5 to 1 of it and keeps what changes the
group's own outputs least; `awq_lite` finds the scales of channels that change the linear's outputs least.

Both losses depend on inputs only through their second moment, so that the rows of a root R of our Hessian, R^T R = H,
stand for all tokens: for a clip as many rows as a group has columns, since groups are judged one by one. What
`awq_lite` reads besides, mean |x|, is the input of its first pass. The scale, `amax / (2^(b-1) - 1)`, is rounded to its
stored type before ModelOpt's quantiser rounds the weights with it.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from typing import Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from deepseek_compress.errors import DscError
from deepseek_compress.numerics import grid
from deepseek_compress.numerics.hessian import damped
from deepseek_compress.numerics.migration import LARGEST, SMALLEST, Migration
from deepseek_compress.numerics.types import Quantized, Statistics, WeightQuantizer

LOADED = 300_000_000  # bytes that importing it takes, with what its search holds
AT_ONCE = 1 << 23  # products of inputs and weights that the search for a clip holds
UNREACHED = 1e-6  # damping, so that a group that no token reached is judged by its weights: its range would be halved
MISSING = "nvidia-modelopt is not installed", "pip install 'deepseek-compress[modelopt]'"


class ModelOptMax(WeightQuantizer, frozen=True):
    """NVIDIA ModelOpt's max calibration: rounded to nearest up to the largest magnitude of a group, data-free."""

    paper: ClassVar[str] = "Wu et al. 2020, Integer Quantization for Deep Learning Inference, arXiv 2004.09602"
    loads: ClassVar[int] = LOADED
    symmetric: bool = True  # there is no other

    @model_validator(mode="after")
    def _can_run(self) -> ModelOptMax:
        if not self.symmetric:
            raise ValueError("ModelOpt's whole-number grids have no zero points; leave symmetric out")
        if find_spec("modelopt") is None:
            raise ValueError("; ".join(MISSING))
        return self

    def __call__(self, weight: Tensor, statistics: Statistics) -> Quantized:
        """`weight` float32 (rows, columns)."""
        size = grid.fit_group_size(weight.shape[1], self.group_size)
        parts = self._parts(weight, size, statistics)
        codes, scale = (torch.cat(part) for part in zip(*parts, strict=True))
        middle = torch.full_like(scale, 2 ** (self.num_bits - 1), dtype=torch.uint8)
        return Quantized(codes, scale, middle, self.num_bits, True)

    def _parts(self, weight: Tensor, size: int, statistics: Statistics) -> list[tuple[Tensor, Tensor]]:
        """Codes and scales of consecutive rows, as `_rounded` gives them."""
        return [_rounded(weight, _calibrated(weight, self.num_bits, size, {"method": "max"}), self.num_bits)]


class ModelOptAwqClip(ModelOptMax, frozen=True):
    """NVIDIA ModelOpt's AWQ clip: each group's range shrunk to where its own outputs suffer least."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    paper: ClassVar[str] = "Lin et al. 2023, AWQ, arXiv 2306.00978"

    def _parts(self, weight: Tensor, size: int, statistics: Statistics) -> list[tuple[Tensor, Tensor]]:
        assert statistics.hessian is not None, "awq_clip needs the Hessian: see `needs`"
        own = damped(statistics.hessian, UNREACHED).unfold(0, size, size).unfold(1, size, size)
        inputs = root(own.diagonal().movedim(-1, 0)).movedim(0, 1).flatten(1)  # (group_size, columns)
        algorithm = {"method": "awq_clip", "max_tokens_per_batch": size}
        parts = []
        for part in torch.split(weight, max(1, AT_ONCE // inputs.numel())):
            found = _calibrated(part, self.num_bits, size, algorithm, lambda linear: linear(inputs))
            parts.append(_rounded(part, found, self.num_bits))
        return parts


class ModelOptAwqLite(Migration, frozen=True):
    """NVIDIA ModelOpt's AWQ lite: scales of channels, searched over all weights that read them as over one."""

    needs: ClassVar[frozenset[str]] = frozenset({"hessian", "input_absmean"})
    paper: ClassVar[str] = "Lin et al. 2023, AWQ, arXiv 2306.00978"
    loads: ClassVar[int] = LOADED
    num_bits: int = Field(4, ge=2, le=8)  # of the rounding that is tried
    group_size: int | None = Field(None, gt=0)

    def scales(self, weights: Sequence[Tensor], statistics: Statistics) -> Tensor:
        """Needs `statistics.hessian` and `input_absmean`."""
        assert statistics.hessian is not None, "awq_lite needs the Hessian"
        assert statistics.input_absmean is not None, "awq_lite needs the mean absolute input"
        passes = iter((statistics.input_absmean[None], root(statistics.hessian)))  # it measures, then it searches
        weight = torch.cat(list(weights))
        size = grid.fit_group_size(weight.shape[1], self.group_size)
        found = _calibrated(weight, self.num_bits, size, {"method": "awq_lite"}, lambda linear: linear(next(passes)))
        divided: Tensor = found.input_quantizer.pre_quant_scale
        return (1 / divided.float()).clamp(SMALLEST, LARGEST)


def root(hessian: Tensor) -> Tensor:
    """R (..., n, n) with R^T R = `hessian` (..., n, n), which few tokens leave without a Cholesky factor."""
    values, vectors = torch.linalg.eigh(hessian)
    found: Tensor = values.clamp(min=0).sqrt()[..., None] * vectors.mT
    return found


def _calibrated(
    weight: Tensor,
    num_bits: int,
    group_size: int,
    algorithm: dict[str, Any],
    forward: Callable[[nn.Module], object] | None = None,
) -> Any:
    """ModelOpt's linear with `weight` (rows, columns), after `algorithm` has run on it."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")  # draws no random numbers
    linear.weight = nn.Parameter(weight, requires_grad=False)
    cfg = {"num_bits": num_bits, "block_sizes": {-1: group_size, "type": "static"}}
    quantizers = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": cfg, "enable": True},
    ]
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it prints what it does where results go
        warnings.simplefilter("ignore")
        try:
            import modelopt.torch.quantization as mtq
        except ImportError as error:
            raise DscError(*MISSING) from error
        return mtq.quantize(linear, {"quant_cfg": quantizers, "algorithm": algorithm}, forward)


def _rounded(weight: Tensor, linear: Any, num_bits: int) -> tuple[Tensor, Tensor]:
    """Codes (rows, columns) and scales (rows, groups) of `weight` as the quantiser of ModelOpt's `linear` rounds it."""
    largest, quantizer = 2 ** (num_bits - 1) - 1, linear.weight_quantizer
    scale = (quantizer.amax.float() / largest).to(grid.STORED).float()
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of zeros
    quantizer.amax = scale * largest
    codes = (quantizer(weight).view(len(scale), -1) / scale).round() + (largest + 1)
    return codes.to(torch.uint8).view_as(weight), scale.view(len(weight), -1)

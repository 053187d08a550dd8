"""The compression algorithms: pure torch, no input or output; each file one paper or one idea.

The tables are what a recipe can name. A new algorithm is one file and one line here; the tests over the tables then
cover it.
"""

from __future__ import annotations

from deepseek_compress.numerics.activations import Activations, Dynamic, Static
from deepseek_compress.numerics.awq import Awq
from deepseek_compress.numerics.gptaq import Gptaq
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.held_scales import HeldScales
from deepseek_compress.numerics.hqq import Hqq
from deepseek_compress.numerics.learned import Learned
from deepseek_compress.numerics.magnitude import Magnitude
from deepseek_compress.numerics.migration import AwqScales, Migration, SmoothQuant
from deepseek_compress.numerics.modelopt import ModelOptAwqClip, ModelOptAwqLite, ModelOptMax
from deepseek_compress.numerics.quantease import QuantEase
from deepseek_compress.numerics.reconstruct import Reconstruct
from deepseek_compress.numerics.rotation import Hadamard
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.sparsegpt import SparseGpt
from deepseek_compress.numerics.types import Quantized, Sparsifier, Statistics, WeightQuantizer

WEIGHTS: dict[str, type[WeightQuantizer]] = {
    "rtn": Rtn,
    "hqq": Hqq,
    "awq": Awq,
    "gptq": Gptq,
    "gptaq": Gptaq,
    "quantease": QuantEase,
    "learned": Learned,
    "modelopt_max": ModelOptMax,
    "modelopt_awq_clip": ModelOptAwqClip,
}
SPARSITY: dict[str, type[Sparsifier]] = {"magnitude": Magnitude, "sparsegpt": SparseGpt, "reconstruct": Reconstruct}
ACTIVATIONS: dict[str, type[Activations]] = {"dynamic": Dynamic, "static": Static}
MIGRATION: dict[str, type[Migration]] = {
    "smoothquant": SmoothQuant,
    "held_scales": HeldScales,
    "awq": AwqScales,
    "modelopt_awq_lite": ModelOptAwqLite,
}
ROTATION: dict[str, type[Hadamard]] = {"hadamard": Hadamard}

__all__ = [
    "ACTIVATIONS", "MIGRATION", "ROTATION", "SPARSITY", "WEIGHTS", "Migration", "Quantized", "Sparsifier", "Statistics",
    "WeightQuantizer",
]  # fmt: skip

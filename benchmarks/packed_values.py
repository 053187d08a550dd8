"""Relative error of 4-bit outputs against their source, decoded by code that is not ours.

`pack-quantized` is decoded by the compressed-tensors package, GPTQ's layout (auto-round's) by the few lines below
(codes along the columns; zero points as they are where `packing_format` is `auto_round`, else less one).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

SAMPLE = 12  # matrices, taken evenly


class Stored:
    """The tensors of a directory by name, read one at a time."""

    def __init__(self, path: Path) -> None:
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        self.files = {}
        for file in sorted(path.rglob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                self.files.update(dict.fromkeys(opened.keys(), file))

    def read(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as opened:
            return opened.get_tensor(name)  # type: ignore[no-any-return]


def decoded_errors(source: Path, out: Path) -> float:
    """||decoded - source|| / ||source|| over a sample of the matrices that `out` has in 4 bits."""
    original, made = Stored(source), Stored(out)
    modules = sorted(name.rpartition(".")[0] for name in made.files if name.endswith((".weight_packed", ".qweight")))
    if not modules:
        raise SystemExit(f"{out}: nothing in it is 4-bit")
    chosen = modules[:: -(-len(modules) // SAMPLE)]
    off, whole = 0.0, 0.0
    for module in chosen:
        expected = _original(original, module)
        found = _packed(made, module) if f"{module}.weight_packed" in made.files else _gptq(made, module)
        off += float((found.float() - expected).square().sum())
        whole += float(expected.square().sum())
    return math.sqrt(off / whole)


def _original(stored: Stored, module: str) -> Tensor:
    weight = stored.read(f"{module}.weight")
    if weight.dtype != torch.float8_e4m3fn:
        return weight.float()
    scale = stored.read(f"{module}.weight_scale_inv")
    rows, columns = weight.shape
    return weight.float() * scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]


def _packed(stored: Stored, module: str) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(stored.config["quantization_config"])
    (scheme,) = config.config_groups.values()
    suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    parts = {suffix: stored.read(f"{module}.{suffix}") for suffix in suffixes if f"{module}.{suffix}" in stored.files}
    return PackedQuantizationCompressor.decompress(parts, scheme)["weight"]  # type: ignore[no-any-return]


def _gptq(stored: Stored, module: str) -> Tensor:
    """qweight (K/8, N), qzeros (K/g, N/8), scales (K/g, N) -> (N, K)."""
    config = stored.config["quantization_config"]
    shift = torch.arange(0, 32, 4, dtype=torch.int32)
    qweight, qzeros = stored.read(f"{module}.qweight"), stored.read(f"{module}.qzeros")
    codes = (qweight.unsqueeze(1) >> shift[None, :, None] & 15).reshape(-1, qweight.shape[1])
    zeros = (qzeros.unsqueeze(-1) >> shift & 15).reshape(qzeros.shape[0], -1)
    if config.get("packing_format") != "auto_round":
        zeros = zeros + 1
    scale = stored.read(f"{module}.scales").float()
    group = codes.shape[0] // scale.shape[0]
    values = (codes - zeros.repeat_interleave(group, 0)).float() * scale.repeat_interleave(group, 0)
    return values.T

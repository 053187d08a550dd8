"""Relative error of 4-bit outputs against their source, decoded by code that is not ours.

`pack-quantized` is decoded by the compressed-tensors package, GPTQ's layout (auto-round's) by the few lines below
(codes along the columns; zero points as they are where `packing_format` is `auto_round`, else less one).
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

SAMPLE = 12  # matrices, taken evenly
ROWS = 4096  # of a table of embeddings that are decoded
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])  # E2M1 without its sign


class Stored:
    """The tensors of a directory by name, read one at a time."""

    def __init__(self, path: Path) -> None:
        self.config: dict[str, Any] = json.loads((path / "config.json").read_text())
        self.files = {}
        for file in sorted(path.rglob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                self.files.update(dict.fromkeys(opened.keys(), file))

    def read(self, name: str, rows: int | None = None) -> Tensor:
        """A tensor, or its first `rows`."""
        with safe_open(self.files[name], "pt") as opened:
            return opened.get_tensor(name) if rows is None else opened.get_slice(name)[:rows]  # type: ignore[no-any-return]

    def codes_of_integers(self, name: str) -> bool:
        """Whether a packed tensor holds integers, not the FP4 values of a kept expert."""
        with safe_open(self.files[name], "pt") as opened:
            return bool(opened.get_slice(name).get_dtype() == "I32")


def decoded_errors(source: Path, out: Path) -> float:
    """||decoded - source|| / ||source|| over a sample of the matrices that `out` has in 4 bits."""
    original, made = Stored(source), Stored(out)
    modules = sorted(
        name.rpartition(".")[0]
        for name in made.files
        if name.endswith(".qweight") or (name.endswith(".weight_packed") and made.codes_of_integers(name))
    )
    if not modules:
        raise SystemExit(f"{out}: nothing in it is 4-bit")
    chosen = modules[:: -(-len(modules) // SAMPLE)]
    off, whole = 0.0, 0.0
    for module in [*chosen, *(name for name in modules if name.endswith(".embed") and name not in chosen)]:
        rows = None
        if module.endswith(".embed"):  # a table does not fit into memory; zero points are packed by eight rows
            rows = min(ROWS, int(made.read(f"{module}.weight_shape")[0]) // 8 * 8)
        expected = _original(original, module, rows)
        found = _packed(made, module, rows) if f"{module}.weight_packed" in made.files else _gptq(made, module)
        off += float((found.float() - expected).square().sum())
        whole += float(expected.square().sum())
    return math.sqrt(off / whole)


def _original(stored: Stored, module: str, rows: int | None = None) -> Tensor:
    """The first `rows` of a weight as published: 16 bits, FP8 in blocks (DeepSeek-V3, V4.1), or FP4."""
    weight = stored.read(f"{module}.weight", rows)
    if weight.dtype == torch.int8:
        codes = torch.stack([weight.view(torch.uint8) & 15, weight.view(torch.uint8) >> 4], -1).flatten(1)
        values = FP4[(codes & 7).long()] * (1 - 2 * (codes >> 3).float())
        return values * stored.read(f"{module}.scale").float().repeat_interleave(32, 1)
    if weight.dtype != torch.float8_e4m3fn:
        return weight.float()
    if f"{module}.scale" not in stored.files:
        height = width = 128
        scale = stored.read(f"{module}.weight_scale_inv")
    else:
        height, width = (32, 32) if rows is None else (1, 32)
        scale = stored.read(f"{module}.scale", rows).float()
    spread = scale.repeat_interleave(height, 0).repeat_interleave(width, 1)
    return weight.float() * spread[: weight.shape[0], : weight.shape[1]]


def _packed(stored: Stored, module: str, rows: int | None = None) -> Tensor:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(stored.config["quantization_config"])
    (scheme,) = (
        scheme for scheme in config.config_groups.values() if len(config.config_groups) == 1 or _meant(scheme, module)
    )
    suffixes = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape")
    parts = {
        suffix: stored.read(f"{module}.{suffix}", None if suffix == "weight_shape" else rows)
        for suffix in suffixes
        if f"{module}.{suffix}" in stored.files
    }
    if rows is not None:
        parts["weight_shape"][0] = rows
        zeros = parts.get("weight_zero_point")
        if zeros is not None:  # packed along the rows, eight in a word
            parts["weight_zero_point"] = zeros[: rows // 8]
    return PackedQuantizationCompressor.decompress(parts, scheme)["weight"]  # type: ignore[no-any-return]


def _meant(scheme: Any, module: str) -> bool:
    return any(re.match(pattern.removeprefix("re:"), module) for pattern in scheme.targets)


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

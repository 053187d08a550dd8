"""Short description of a checkpoint: `4-bit asymmetric, groups of 64, 2:4 sparse, 8-bit activations per token`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from deepseek_compress.checkpoint import Checkpoint, TensorInfo
from deepseek_compress.checkpoint.verified import hash_of
from deepseek_compress.models import Architecture, Role
from deepseek_compress.numerics.kv_cache import KvRounding

PROBES = 3  # matrices read to tell whether the weights are 2:4 sparse
NAMES = {torch.bfloat16: "BF16", torch.float16: "FP16", torch.float32: "FP32"}


def about(checkpoint: Checkpoint, kv_cache: KvRounding | None = None) -> str:
    """From headers, config and manifest, and `PROBES` matrices that are read to see their zeros.

    `kv_cache`: how keys and values are stored where the model is run.
    """
    linears = _linears(checkpoint)
    if not linears:
        return ""
    shares: Counter[str] = Counter()
    for info in linears:
        shares[_encoding(info, checkpoint)] += info.elements
    parts = [shares.most_common(1)[0][0]]
    spread = [linears[i * (len(linears) - 1) // max(PROBES - 1, 1)] for i in range(PROBES)]
    if all(_two_of_four(checkpoint, info) for info in spread):
        parts.append("2:4 sparse")
    activations = checkpoint.activations
    if activations:
        bits, granularity = activations.get("num_bits"), activations.get("granularity")
        words = f"{bits}-bit activations" if bits else "quantised activations"
        parts.append(f"{words} per {granularity}" if granularity else words)
    if kv_cache is not None:
        some = (
            ""
            if kv_cache.window is None
            else f", {'4 bits beyond' if kv_cache.rest else 'evicted beyond'} what is kept"
        )
        parts.append(f"{kv_cache.num_bits}-bit KV cache{' of differences' if kv_cache.delta else ''}{some}")
    return ", ".join(parts)


def _linears(checkpoint: Checkpoint) -> list[TensorInfo]:
    """Return the matrices of blocks that a recipe may change."""
    tensors = checkpoint.header.tensors
    names = (name + ".weight" for name, _ in Architecture.of(checkpoint).linears(frozenset(Role)))
    return [tensors[name] for name in names if name in tensors]


def _encoding(info: TensorInfo, checkpoint: Checkpoint) -> str:
    if info.encoding == "fp8_block":
        return "FP8 in blocks"
    if info.encoding == "mxfp4":
        return "MXFP4"
    if info.encoding == "plain":
        return NAMES.get(info.dtype, str(info.dtype).removeprefix("torch."))
    return _packed(checkpoint.config.get("quantization_config") or {})


def _packed(config: dict[str, Any]) -> str:
    """Return the first group of a compressed-tensors configuration; every group of ours differs in its group size
    only."""
    groups = list((config.get("config_groups") or {}).values())
    weights = (groups[0].get("weights") if groups else None) or {}
    kind = "symmetric" if weights.get("symmetric") else "asymmetric"
    size = weights.get("group_size")
    grouping = f", groups of {size}" if size and size > 0 else ", one scale a row"
    return f"{weights.get('num_bits', '?')}-bit {kind}{grouping}"


def _two_of_four(checkpoint: Checkpoint, info: TensorInfo) -> bool:
    if info.shape[1] % 4:
        return False
    zeros = (checkpoint.read(info.name).view(-1, 4) == 0).sum(1)
    return bool((zeros >= 2).all())


def seen_before(text: Path, checkpoints: Mapping[str, Checkpoint]) -> list[str]:
    """Return a note on each model whose manifest says that it was calibrated on the file that judges it."""
    here, notes = hash_of(text), []
    for name, checkpoint in checkpoints.items():
        calibration = (checkpoint.manifest or {}).get("calibration") or {}
        if any(here in (source.get("files") or {}).values() for source in calibration.get("sources") or []):
            notes.append(f"{name} was calibrated on {text.name}: expect worse on text it never saw.")
    return notes

"""Contents of a checkpoint: roles, encodings, bits, sparsity, lineage; and whether its files are unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from deepseek_compress.checkpoint.formats import packed
from deepseek_compress.checkpoint.header import TensorInfo
from deepseek_compress.checkpoint.reader import Checkpoint
from deepseek_compress.checkpoint.verified import listed, wrong
from deepseek_compress.errors import DscError


def summarize(
    checkpoint: Checkpoint, role: Callable[[str], str] = lambda name: "tensor", *, sparsity: bool = False
) -> dict[str, Any]:
    """From headers alone, unless `sparsity` asks to count zeros (reads every matrix).

    {"path", "model_type", "tensors", "parameters", "bytes", "bits_per_weight", "shards", "activations", "kv_cache",
     "lineage", "roles": [{"role", "encoding", "num_bits", "dtype", "tensors", "parameters", "bytes", "bits_per_weight",
                "sparsity"}]};
    num_bits is that of packed codes, 0 elsewhere; parameters count unpacked elements without scales, sparsity is a
    fraction or None.
    """
    groups: dict[_Key, list[TensorInfo]] = {}
    for name, info in checkpoint.header.tensors.items():
        key = _Key(str(role(name)), info.encoding, _num_bits(info), str(info.dtype).removeprefix("torch."))
        groups.setdefault(key, []).append(info)
    rows = [_row(key, infos, checkpoint if sparsity else None) for key, infos in sorted(groups.items())]
    parameters = sum(row["parameters"] for row in rows)
    size = sum(file.stat().st_size for file in _shard_files(checkpoint))
    return {
        "path": str(checkpoint.path),
        "model_type": checkpoint.config.get("model_type"),
        "tensors": sum(row["tensors"] for row in rows),
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": 8 * size / parameters if parameters else None,
        "shards": len(_shard_files(checkpoint)),
        "activations": checkpoint.manifest_activations,
        "kv_cache": checkpoint.kv_cache,
        "lineage": (checkpoint.manifest or {}).get("lineage") or [],
        "roles": rows,
    }


def verify_hashes(checkpoint: Checkpoint) -> Iterator[DscError]:
    """Every file of the manifest whose bytes are not those that were written; nothing without a manifest."""
    yield from wrong(checkpoint.path, listed(checkpoint.manifest))


class _Key(NamedTuple):
    """Attributes that the tensors of a row share."""

    role: str
    encoding: str
    num_bits: int
    dtype: str


def _num_bits(info: TensorInfo) -> int:
    return packed.stored_bits(info) if info.encoding == "packed" else 0


def _row(key: _Key, infos: list[TensorInfo], checkpoint: Checkpoint | None) -> dict[str, Any]:
    parameters = sum(info.elements for info in infos)
    size = sum(info.bytes for info in infos)
    return {
        **key._asdict(),
        "tensors": len(infos),
        "parameters": parameters,
        "bytes": size,
        "bits_per_weight": 8 * size / parameters if parameters else None,
        "sparsity": _zeros(checkpoint, infos) / parameters if checkpoint and parameters else None,
    }


def _zeros(checkpoint: Checkpoint, infos: list[TensorInfo]) -> int:
    return sum(int((checkpoint.read(info.name, torch.bfloat16) == 0).sum()) for info in infos)


def _shard_files(checkpoint: Checkpoint) -> list[Any]:
    return sorted({part.file for info in checkpoint.header.tensors.values() for part in info.parts.values()})

"""The manifest beside every output: what it was made of and how, so that the same input can be told from another.

Deterministic: no time, no host, no absolute path. What differs from run to run (time, peaks, host) stands in
`dsc_run.json`, which the pipeline writes.

    {"schema": 1, "stage", "recipe", "seed", "knobs", "source": {"name", "files": {name: {"bytes", "blake3"}}},
     "inputs": {name: blake3}, "lineage": [{"stage", "fingerprint", ...}], "versions": {...}, "activations", "files"}

`lineage` lists every stage from the published checkpoint to this output, the oldest first. The writer adds
`activations` and `files`, the hashes of what it wrote.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deepseek_compress.checkpoint.files import hash_file, read_json
from deepseek_compress.checkpoint.reader import MANIFEST, Checkpoint

__all__ = [
    "build_manifest", "digest", "fingerprint", "hash_file", "lineage_of", "read_manifest", "source_facts", "versions",
]  # fmt: skip

SCHEMA = 1
PACKAGES = (
    "deepseek-compress", "torch", "transformers", "tokenizers", "safetensors", "numpy", "onnx", "onnxscript",
    "onnxruntime-gpu", "onnxruntime", "nvidia-modelopt", "tensorrt-cu13", "tensorrt-rtx-cu13", "compressed-tensors",
)  # fmt: skip


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str | None]:
    """Installed versions by distribution name, Python and the processor's type; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "machine": platform.machine()}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def build_manifest(
    *,
    stage: str,
    source: Checkpoint | None,
    recipe: str = "",
    seed: int = 0,
    knobs: Mapping[str, Any] | None = None,
    inputs: Mapping[str, Path] | None = None,
    name: str | None = None,
    hash_source: bool = True,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest of an output of `stage`, to hand to `CheckpointWriter.finish`.

    inputs: other files that went in (calibration text), by a name of your choice. name: what the model card calls the
    source; its directory's name otherwise. hash_source: take the BLAKE3 of every shard that the source's own manifest
    does not list (one pass over the files); otherwise only headers and config are hashed. extra: more keys.
    """
    facts = source_facts(source, name, hash_source) if source is not None else None
    step = {
        "stage": stage,
        "knobs": dict(knobs or {}),
        "seed": seed,
        "source": facts["name"] if facts else None,
        "fingerprint": facts["fingerprint"] if facts else None,
    }
    return {
        "schema": SCHEMA,
        "stage": stage,
        "recipe": recipe,
        "seed": seed,
        "knobs": dict(knobs or {}),
        "source": facts,
        "inputs": {key: hash_file(path) for key, path in sorted((inputs or {}).items())},
        "lineage": [*(lineage_of(source) if source is not None else []), step],
        "versions": versions(),
        **(extra or {}),
    }


def source_facts(source: Checkpoint, name: str | None = None, hash_shards: bool = True) -> dict[str, Any]:
    """{"name", "fingerprint", "files"}: the shards' sizes and hashes, None where they were not taken."""
    known = (source.manifest or {}).get("files") or {}
    shards = sorted({part.file for info in source.header.tensors.values() for part in info.parts.values()})
    files: dict[str, Any] = {}
    for shard in shards:
        size = shard.stat().st_size
        listed = known.get(shard.name) or {}
        digest = listed.get("blake3") if listed.get("bytes") == size else None
        if digest is None and hash_shards:
            digest = hash_file(shard)
        files[shard.name] = {"bytes": size, "blake3": digest}
    return {"name": name or source.path.resolve().name, "fingerprint": fingerprint(source), "files": files}


def fingerprint(source: Checkpoint) -> str:
    """SHA-256 over config, every tensor's name, type, shape and place, and a manifest's hashes: cheap, from headers.

    Two checkpoints of equal fingerprint may still differ in values where neither has a manifest; hash the shards to
    be sure.
    """
    tensors = [
        [name, suffix, str(part.dtype), list(part.shape), part.file.name, part.offset]
        for name, info in sorted(source.header.tensors.items())
        for suffix, part in sorted(info.parts.items())
    ]
    hashes = (source.manifest or {}).get("files")
    return digest([source.config, tensors, hashes])


def lineage_of(source: Checkpoint) -> list[dict[str, Any]]:
    """The stages that made this checkpoint, the oldest first; none for a published one."""
    return list((source.manifest or {}).get("lineage") or [])


def read_manifest(output: Path) -> dict[str, Any] | None:
    """dsc_manifest.json of any output, or None."""
    path = output / MANIFEST
    return read_json(path) if path.is_file() else None


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()

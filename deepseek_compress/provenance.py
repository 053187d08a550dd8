"""The manifest of every output: what it was made of and how, so that different inputs can be distinguished.

Deterministic: no time, no host, no absolute path. What differs from run to run (time, peaks, host) stands in
`dsc_run.json`, which the pipeline writes.

    {"schema": 2, "stage", "recipe", "seed", "knobs", "source": {"name", "files": {name: {"bytes", "blake3"}}},
     "inputs": {name: blake3}, "lineage": [{"stage", "fingerprint", ...}], "versions": {...}, "activations", "kv_cache",
     "files", "pipeline", "checksum"}

`lineage` lists every stage from the published checkpoint to this output, the oldest first. The writer adds
`activations`, the source's `kv_cache` where no other is given, and `files`, size and hash of every file it wrote;
the pipeline adds those of its own, and what marks the stage finished. `checksum` is that of the file itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from deepseek_compress.checkpoint.files import disk_errors, hash_file
from deepseek_compress.checkpoint.reader import Checkpoint
from deepseek_compress.checkpoint.verified import hash_of, listed, manifest_of

__all__ = [
    "build_manifest", "digest", "fingerprint", "hash_file", "lineage_of", "read_manifest", "source_facts", "unhashed",
    "versions",
]  # fmt: skip

SCHEMA = 2  # 1 had no checksum
SAMPLES, SAMPLE = 16, 4096  # pieces of a shard that a fingerprint reads, and their bytes
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
    hashes: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the manifest of an output of `stage`, to hand to `CheckpointWriter.finish`.

    inputs: other files that went in (calibration text), by a name of your choice. name: what the model card calls the
    source; its directory's name otherwise. hashes: BLAKE3 of the source's files, where they were taken already; what
    neither they nor the source's own manifest list is hashed here. extra: more keys.
    """
    facts = source_facts(source, name, hashes) if source is not None else None
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


def source_facts(
    source: Checkpoint, name: str | None = None, hashes: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """{"name", "fingerprint", "files"}: sizes and hashes of the shards, taken here unless `hashes` has them."""
    known = {**_listed(source), **(hashes or {})}
    files = {
        shard.name: {"bytes": shard.stat().st_size, "blake3": known.get(shard.name) or hash_of(shard)}
        for shard in _shards(source)
    }
    return {"name": name or source.path.resolve().name, "fingerprint": fingerprint(source), "files": files}


def unhashed(source: Checkpoint) -> list[Path]:
    """Shards whose hash the source's own manifest does not tell."""
    known = _listed(source)
    return [shard for shard in _shards(source) if shard.name not in known]


def fingerprint(source: Checkpoint) -> str:
    """SHA-256 over config, every tensor's name, type, shape and place, and a sample of each shard's bytes.

    Cheap whatever the size. Two checkpoints of equal fingerprint could differ in single values only; hash the shards
    to be sure.
    """
    tensors = [
        [name, suffix, str(part.dtype), list(part.shape), part.file.name, part.offset]
        for name, info in sorted(source.header.tensors.items())
        for suffix, part in sorted(info.parts.items())
    ]
    return digest([source.config, tensors, {shard.name: _sample(shard) for shard in _shards(source)}])


def _sample(file: Path) -> str:
    """SHA-256 of pieces from all over a file."""
    size, found = file.stat().st_size, hashlib.sha256()
    with disk_errors(file), open(file, "rb", buffering=0) as opened:
        for i in range(SAMPLES):
            found.update(os.pread(opened.fileno(), SAMPLE, size * i // SAMPLES))
    return found.hexdigest()


def _shards(source: Checkpoint) -> list[Path]:
    return sorted({part.file for info in source.header.tensors.values() for part in info.parts.values()})


def _listed(source: Checkpoint) -> dict[str, str]:
    """Hashes in the source's own manifest, of files that still have the size they had."""
    files = listed(source.manifest)
    sizes = {shard.name: shard.stat().st_size for shard in _shards(source)}
    return {
        name: facts["blake3"]
        for name, facts in files.items()
        if facts.get("blake3") and facts.get("bytes") == sizes.get(name)
    }


def lineage_of(source: Checkpoint) -> list[dict[str, Any]]:
    """Return the stages that made this checkpoint, the oldest first; none for a published one."""
    return list((source.manifest or {}).get("lineage") or [])


def read_manifest(output: Path) -> dict[str, Any] | None:
    """dsc_manifest.json of any output, or None."""
    return manifest_of(output)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, keys sorted."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode("utf-8")).hexdigest()

"""The two targets that are checkpoints: packed as it is, and plain BF16."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from deepseek_compress.checkpoint import Checkpoint, CheckpointWriter, Header
from deepseek_compress.errors import DscError
from deepseek_compress.export.target import Exported, Job, Target


class CompressedTensors(Target, frozen=True, extra="forbid"):
    """The packed checkpoint as it is: every tensor read, checked and copied."""

    name: ClassVar[str] = "compressed-tensors"

    def problems(self, header: Header) -> list[DscError]:
        """Return a checkpoint that nothing packed."""
        if any(info.encoding == "packed" for info in header.tensors.values()):
            return []
        return [DscError(f"{header.path}: holds no packed weights", "run `dsc quantize` first, and export its output")]

    def write(self, source: Checkpoint, out: Path, job: Job) -> Exported:
        """Copy every tensor."""
        ignore = (source.config.get("quantization_config") or {}).get("ignore") or []
        with CheckpointWriter(out, source, activations=source.activations) as writer:
            for name in source.header.tensors:
                writer.copy(name)
            notes = writer.finish({}, job.manifest, [str(name) for name in ignore])
        packed = sum(info.encoding == "packed" for info in source.header.tensors.values())
        return _exported(self, out, job, notes, {"packed_tensors": packed})


class Bf16(Target, frozen=True, extra="forbid"):
    """Every weight decoded to plain BF16. Vectors and tensors that are wider on purpose keep their stored type."""

    name: ClassVar[str] = "bf16"

    def write(self, source: Checkpoint, out: Path, job: Job) -> Exported:
        """Decode every tensor."""
        notes = []
        if source.activations:
            notes.append("8-bit activations are not part of a BF16 checkpoint: what loads it computes with 16-bit ones")
        with CheckpointWriter(out, source) as writer:
            for name, info in source.header.tensors.items():
                wide = len(info.shape) > 1 and info.dtype in (torch.float32, torch.float16)
                writer.add(name, source.read(name, torch.bfloat16 if wide or info.encoding != "plain" else None))
            notes += writer.finish({}, job.manifest, [])
        return _exported(self, out, job, notes, {})


def _exported(target: Target, out: Path, job: Job, notes: Sequence[str], facts: dict[str, Any]) -> Exported:
    for note in notes:
        job.tell(note)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return Exported("checkpoint", out, {"target": target.name, "bytes": size, "status": "checked", **facts})

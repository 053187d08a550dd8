"""Write a checkpoint, streaming."""

from __future__ import annotations

from pathlib import Path

from deepseek_compress.checkpoint.reader import Checkpoint


class CheckpointWriter:
    """Filled in by the next commit."""

    def __init__(self, out: Path, source: Checkpoint, *, shard_bytes: int = 5_000_000_000) -> None:
        raise NotImplementedError

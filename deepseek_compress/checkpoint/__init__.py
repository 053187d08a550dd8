"""Checkpoints on disk: headers, reading with every published encoding undone, and writing."""

from __future__ import annotations

from deepseek_compress.checkpoint.header import Header, TensorInfo
from deepseek_compress.checkpoint.reader import Checkpoint, is_checkpoint, open_checkpoint
from deepseek_compress.checkpoint.writer import CheckpointWriter

__all__ = ["Checkpoint", "CheckpointWriter", "Header", "TensorInfo", "is_checkpoint", "open_checkpoint"]

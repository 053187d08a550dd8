"""Keep the state of a training on disk, every few minutes, so that the same command goes on after any interruption."""

from __future__ import annotations

import hashlib
import io
import time
from pathlib import Path
from typing import Any

import blake3
import torch

from deepseek_compress.checkpoint.files import disk_errors, remove, replacing
from deepseek_compress.distillation.trainer import State

FILE = ".dsc_training.pt"
_SEAL = 32  # bytes of a hash, at the end of the file
EVERY = 60.0  # seconds between two saves


class Keeper:
    """Saves and loads the state of one training; the state of any other training is thrown away."""

    def __init__(self, folder: Path, identity: Any) -> None:
        self.file = folder / FILE
        self.identity = hashlib.sha256(repr(identity).encode()).hexdigest()
        self._saved = time.monotonic()

    def load(self) -> State | None:
        """The state that was saved last, or None."""
        content = self.file.read_bytes() if self.file.is_file() else b""
        if blake3.blake3(content[:-_SEAL]).digest() != content[-_SEAL:]:
            return None  # there is none, or it is damaged: the training begins again
        found = torch.load(io.BytesIO(content[:-_SEAL]), weights_only=True)
        return State(**found["state"]) if found["identity"] == self.identity else None

    def save(self, state: State) -> None:
        """Write `state` if the last save is long enough ago: beside, then renamed."""
        if time.monotonic() - self._saved < EVERY:
            return
        with disk_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            torch.save({"identity": self.identity, "state": state._asdict()}, buffer)
            with replacing(self.file) as file:
                file.write(buffer.getbuffer())
                file.write(blake3.blake3(buffer.getbuffer()).digest())
        self._saved = time.monotonic()

    def clear(self) -> None:
        """The training is over and its result written."""
        remove(self.file)

"""Keep the state of a training on disk, every few minutes, so that the same command goes on after any interruption."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import torch

from deepseek_compress.checkpoint.files import disk_errors
from deepseek_compress.distillation.trainer import State

FILE = ".dsc_training.pt"
EVERY = 60.0  # seconds between two saves


class Keeper:
    """Saves and loads the state of one training; the state of any other training is thrown away."""

    def __init__(self, folder: Path, identity: Any) -> None:
        self.file = folder / FILE
        self.identity = hashlib.sha256(repr(identity).encode()).hexdigest()
        self._saved = time.monotonic()

    def load(self) -> State | None:
        """The state that was saved last, or None."""
        if not self.file.is_file():
            return None
        found = torch.load(self.file, weights_only=True)
        return State(**found["state"]) if found["identity"] == self.identity else None

    def save(self, state: State) -> None:
        """Write `state` if the last save is long enough ago: beside, then renamed."""
        if time.monotonic() - self._saved < EVERY:
            return
        with disk_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            beside = self.file.with_suffix(".tmp")
            torch.save({"identity": self.identity, "state": state._asdict()}, beside)
            os.replace(beside, self.file)
        self._saved = time.monotonic()

    def clear(self) -> None:
        """The training is over and its result written."""
        self.file.unlink(missing_ok=True)

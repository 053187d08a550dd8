"""Keep the state of a training on disk, every few minutes, so that the same command resumes it."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import blake3
import torch

from deepseek_compress.checkpoint.files import disk_errors, replacing
from deepseek_compress.distillation.trainer import Measured, State

FILE = "training.pt"
_SEAL = 32  # bytes of a hash, at the end of the file
EVERY = 60.0  # seconds between two saves, at least
LARGEST_SHARE = 0.05  # of the time that goes into saving


class Keeper:
    """Saves and loads the state of the training whose work lies in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / FILE
        self._saved = time.monotonic()
        self._wait = EVERY

    def load(self, device: torch.device | str = "cpu") -> State | None:
        """Return the state that was saved last, its weights on `device`, or None."""
        content = self.file.read_bytes() if self.file.is_file() else b""
        if blake3.blake3(content[:-_SEAL]).digest() != content[-_SEAL:]:
            return None  # there is none, or it is damaged: the training begins again
        kept = torch.load(io.BytesIO(content[:-_SEAL]), weights_only=True)
        trained = kept.pop("trained")
        kept |= {name: _moved(kept[name], device) for name in ("weights", "projections", "best")}
        state = State(**{**kept, "validations": [Measured(*values) for values in kept["validations"]]})
        for name, tensor in (*state.weights.items(), *state.projections.items()):
            tensor.requires_grad_(name in trained)
        return state

    def save(self, state: State) -> None:
        """Write `state` to a temporary file, then rename, if the last save is long enough ago."""
        began = time.monotonic()
        if began - self._saved < self._wait:
            return
        trained = [n for n, t in (*state.weights.items(), *state.projections.items()) if t.requires_grad]
        values = {**vars(state), "validations": [tuple(found) for found in state.validations], "trained": trained}
        with disk_errors(self.file):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            buffer = io.BytesIO()
            torch.save(_moved(values, "cpu"), buffer)
            with replacing(self.file) as file:
                file.write(buffer.getbuffer())
                file.write(blake3.blake3(buffer.getbuffer()).digest())
        self._saved = time.monotonic()
        self._wait = max(EVERY, (self._saved - began) / LARGEST_SHARE)


def _moved(value: Any, device: torch.device | str) -> Any:
    """`value` with the tensors in its dicts, lists and tuples on `device`."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    if isinstance(value, dict):
        return {key: _moved(each, device) for key, each in value.items()}
    return type(value)(_moved(each, device) for each in value) if isinstance(value, (list, tuple)) else value

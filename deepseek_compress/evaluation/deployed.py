"""Files that were exported, and servers, as models of a report: they answer in their own runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepseek_compress.checkpoint import is_checkpoint
from deepseek_compress.checkpoint.files import hash_file
from deepseek_compress.checkpoint.verified import check, manifest_of
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.answering import Answerer, answerer_of
from deepseek_compress.generation.backends.graph import GraphBackend, GraphModel
from deepseek_compress.generation.speaker import Local, Speaker
from deepseek_compress.generation.targets import ENGINE, GENAI, ONNX, open_target
from deepseek_compress.models.resolve import BUILTIN
from deepseek_compress.models.tokenizer import Tokenizer

WEIGHTS = (".onnx", ".data", ".engine", ".gguf", ".bin")  # what of an exported directory holds the model
HTTP = ("http://", "https://")


@dataclass(frozen=True)
class Opened:
    """A deployed file: `predict` gives logits (1, T, vocabulary) of tokens (1, T), where the runtime exposes them."""

    speaker: Speaker
    answerer: Answerer
    about: str
    bytes: int | None
    predict: Callable[[Tensor], Tensor] | None = None
    lineage: tuple[Any, ...] = ()  # of its manifest

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its own; None for a server's."""
        return self.speaker.tokenizer if isinstance(self.speaker, Local) else None

    def same_tokenizer(self, other: Tokenizer) -> bool:
        """Whether its tokens are the reference's."""
        return self.tokenizer is None or self.tokenizer.digest == other.digest


def is_deployed(name: str) -> bool:
    """Whether MODEL names something that was exported, or a server, rather than a checkpoint."""
    if name.startswith(HTTP):
        return True
    path = Path(name).expanduser()
    if name.startswith(BUILTIN) or is_checkpoint(path):
        return False
    return path.is_file() or any((path / file).is_file() for file in (ONNX, ENGINE, GENAI)) or any(path.glob("*.gguf"))


def open_file(target: str) -> Opened:
    """Load it. Raises `DscError` with what is understood, and `Problems` naming files that are not what was written."""
    lineage: tuple[Any, ...] = ()
    if not target.startswith(HTTP):
        lineage = _verified(Path(target).expanduser())
    speaker = open_target(target)
    answerer = answerer_of(speaker, "server" if target.startswith(HTTP) else "")
    if not isinstance(speaker, Local):
        return Opened(speaker, answerer, f"served by {getattr(speaker, 'model', 'a server')}", None)
    backend = speaker.backend
    about = f"runs in {backend.name}" + (f" ({speaker.note})" if speaker.note else "")
    predict = _logits(backend) if isinstance(backend, GraphBackend) else None
    return Opened(speaker, answerer, about, size_of(target), predict, lineage)


def _verified(path: Path) -> tuple[Any, ...]:
    """Return the lineage of an output of ours whose files are what was written; nothing of others' files."""
    folder = path if path.is_dir() else path.parent
    check(folder)
    return tuple((manifest_of(folder) or {}).get("lineage") or ())


def size_of(target: str) -> int:
    """Bytes of the files that hold the model."""
    return sum(file.stat().st_size for file in _weights(target))


def fingerprint(target: str) -> dict[str, Any]:
    """Return what the answers of a target follow from: the hashes of its files, or the address of a server."""
    if target.startswith(HTTP):
        return {"server": target}
    return {file.name: hash_file(file) for file in _weights(target)}


def _weights(target: str) -> list[Path]:
    path = Path(target).expanduser()
    if not path.exists():
        raise DscError(f"{target}: no such file or directory", "give an output of dsc export, or http://HOST:PORT")
    files = [path, *path.parent.glob(f"{path.name}.data")] if path.is_file() else path.rglob("*")
    return sorted(file for file in files if file.is_file() and file.suffix in WEIGHTS)


def _logits(backend: GraphBackend) -> Callable[[Tensor], Tensor]:
    """Return a whole text through the graph, a chunk at a time."""

    def predict(tokens: Tensor) -> Tensor:
        model, ids = GraphModel(backend.model.runner), tokens.numpy().astype(np.int64)
        model.start(1)
        parts = [model.step(ids[:, at : at + backend.chunk]) for at in range(0, ids.shape[1], backend.chunk)]
        return torch.from_numpy(np.concatenate(parts, axis=1))

    return predict

"""Identity of a run besides its models: the lasting part of its recipe, hashes of text, statistics and code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_compress.calibration.sources import files_of
from deepseek_compress.checkpoint import verified
from deepseek_compress.checkpoint.verified import MANIFEST


def text_hashes(source: str) -> dict[str, str]:
    """Hash of each file of a calibration source."""
    return {file.name: verified.hash_of(file) for file in files_of(source)}


def manifest_hash(statistics: str | None) -> str | None:
    """Tell saved statistics from others: their manifest has the hash of each file."""
    return None if statistics is None else verified.hash_of(Path(statistics) / MANIFEST)


def code_hash(**code: str | None) -> dict[str, Any]:
    """Option -> hash of FILE in FILE.py:FUNCTION, of those that are given."""
    files = {option: Path(given.rpartition(":")[0]) for option, given in code.items() if given is not None}
    return {option: verified.hash_of(file) if file.is_file() else None for option, file in files.items()}


def lasting(document: Mapping[str, Any], steps: Sequence[Any]) -> dict[str, Any]:
    """Return a recipe's document without the knobs that change no bytes, so that they may change in one directory."""
    items = []
    for item, step in zip(document["stages"], steps, strict=False):
        kept = {key: value for key, value in step.knobs.items() if key not in step.stage.same_bytes}
        items.append({**item, step.kind: kept} if step.stage.same_bytes else item)
    return {**document, "stages": [*items, *document["stages"][len(items) :]]}

"""Hashes of what a run follows from beside its recipe and models: text, saved statistics, code of the user's."""

from __future__ import annotations

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


def code_hash(verifier: str | None) -> dict[str, Any]:
    """{"verifier": hash of FILE in FILE.py:FUNCTION}, nothing without one."""
    if verifier is None:
        return {}
    file = Path(verifier.rpartition(":")[0])
    return {"verifier": verified.hash_of(file) if file.is_file() else None}

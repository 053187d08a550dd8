"""Calibration text that is the same sentence over and over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    file = tmp_path / "text.jsonl"
    file.write_text(
        "\n".join(json.dumps({"text": "add 3 to 4 then take 2 and say the answer " * 12}) for _ in range(8))
    )
    return file

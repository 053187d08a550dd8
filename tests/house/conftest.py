"""Calibration text of the user's, and the command line in this process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deepseek_compress.cli import app
from deepseek_compress.tasks import mixture

Dsc = Callable[..., Result]


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Problems of the calibration split as JSON Lines."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [{"prompt": p.prompt, "completion": p.solution} for p in mixture(3, 60, split="calibration")]
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


@pytest.fixture
def dsc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dsc:
    """`dsc("list", "--json")` in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])

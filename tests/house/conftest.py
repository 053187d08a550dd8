"""Calibration text of the user's, and the command line in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deepseek_compress import jobs
from deepseek_compress.cli import app

Dsc = Callable[..., Result]


@pytest.fixture
def dsc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dsc:
    """`dsc("list", "--json")` in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(jobs, "FIRST", None)  # no run measures the machine first
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])
